"""Write the Go template that gives the same prompts as the grammar of a chat template."""

from __future__ import annotations

from collections.abc import Sequence

from macft.ollama.grammar import EMPTY, END, GIVEN, NONE, START, Context, Grammar, Piece

# The values of a context's system, before and left, which conditions ask about in this order.
_VALUES = ((NONE, EMPTY, GIVEN), (START, "system", "user", "assistant"), ("1", "2", "3"))
_BEFORE, _LEFT = 1, 2
Rows = dict[tuple[str, ...], Piece]

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def go_template(grammar: Grammar, *, bos: str | None) -> str:
    """The TEMPLATE for Ollama's messages; `bos` at the start of a prompt is left out, as llama.cpp writes it.

    All text is in Go string literals, and each line opens with `{{-`, so that no white space of the layout can
    get into a prompt and no text can be read as Go or end the Modelfile's value.
    """
    if bos:
        grammar = {context: _without(piece, bos, context) for context, piece in grammar.items()}
    branches = [
        ("user", 'if eq .Role "user"'),
        ("assistant", 'else if eq .Role "assistant"'),
        ("system", 'else if and (eq .Role "system") (gt $i 0)'),
    ]
    body: list[str] = []
    for role, condition in branches:
        if rows := _rows(grammar, role):
            lines = [*_choose(rows), "{{- .Content }}", f'{{{{- $before = "{role}" }}}}']
            body += [f"{{{{- {condition} }}}}", *_indented(lines)]
    body.append("{{- end }}")
    if end := _choose(_rows(grammar, END)):
        body += ['{{- if and (eq $left 1) (ne .Role "assistant") }}', *_indented(end), "{{- end }}"]
    head = ['{{- $before := "" }}'] if any("eq $before" in line for line in body) else []
    if not head:
        body = [line for line in body if "$before =" not in line]
    variables = {"$first": "index $.Messages 0", "$left": "len (slice $.Messages $i)"}
    used = [name for name in variables if any(name in line for line in body)]
    body = [f"{{{{- {name} := {variables[name]} }}}}" for name in used] + body
    return "\n".join([*head, "{{- range $i, $message := .Messages }}", *_indented(body), "{{- end }}"])


def quoted(text: str) -> str:
    """A Go string literal; whatever a Modelfile would drop or read differently is escaped."""
    return '"' + "".join(_ESCAPES.get(c) or (c if c.isprintable() else _escaped(ord(c))) for c in text) + '"'


def _escaped(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _without(piece: Piece, bos: str, context: Context) -> Piece:
    return (piece[0].removeprefix(bos), *piece[1:]) if context.before == START else piece


def _rows(grammar: Grammar, role: str) -> Rows:
    return {(c.system, c.before, str(c.left)): piece for c, piece in grammar.items() if c.role == role}


def _choose(rows: Rows) -> list[str]:
    """The lines that write the piece of each row, with the fewest conditions that tell different ones apart."""
    if len(set(rows.values())) <= 1:
        return _written(next(iter(rows.values()), ("",)))
    for strict in (False, True):
        choices = [_chain(groups, i) for i in range(3) if len(groups := _groups(rows, i, strict=strict)) > 1]
        if choices:
            return min(choices, key=len)
    raise AssertionError("different pieces have different rows")


def _written(piece: Piece) -> list[str]:
    text = "{{ $first.Content }}".join(f"{{{{ {quoted(part)} }}}}" if part else "" for part in piece)
    return ["{{-" + text.removeprefix("{{")] if text else []


def _groups(rows: Rows, place: int, *, strict: bool) -> list[tuple[list[str], Rows]]:
    """The values at this place of the rows, with their rows; values whose rows do not differ share a group.

    With `strict` each has its own group: rows may differ without a place that shows it, as not all are known.
    """
    groups: list[tuple[list[str], Rows]] = []
    for value in _VALUES[place]:
        mine = {(*key[:place], "", *key[place + 1 :]): piece for key, piece in rows.items() if key[place] == value}
        if not mine:
            continue
        for values, theirs in groups:
            if not strict and all(theirs.get(key, piece) == piece for key, piece in mine.items()):
                values.append(value)
                theirs.update(mine)
                break
        else:
            groups.append(([value], mine))
    # the last of all values goes to the final else
    return sorted(groups, key=lambda group: _VALUES[place].index(group[0][-1]))


def _chain(groups: Sequence[tuple[list[str], Rows]], place: int) -> list[str]:
    lines: list[str] = []
    for i, (values, rows) in enumerate(groups):
        inner = _choose(rows)
        is_last = i == len(groups) - 1
        if not (is_last and not inner):
            opening = "else" if is_last else f"{'else ' if i else ''}if {_condition(values, place)}"
            lines += [f"{{{{- {opening} }}}}", *_indented(inner)]
    return [*lines, "{{- end }}"]


def _condition(values: list[str], place: int) -> str:
    if place == _LEFT:
        return f"eq $left {' '.join(values)}"
    if place == _BEFORE:
        return "eq $before " + " ".join(quoted(value) for value in values)
    if values == [NONE]:
        return 'ne $first.Role "system"'
    given = 'and (eq $first.Role "system") '
    return f"{given}(not $first.Content)" if values == [EMPTY] else f"not ({given}$first.Content)"


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]
