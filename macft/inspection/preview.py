"""One example, pair or text in; its rendered text with the trained tokens marked, for a terminal or as JSON, out."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from macft.data.formats import conversations as formats
from macft.data.formats.conversations import Example
from macft.data.formats.pairs import PairExample
from macft.data.templates.chat_template import ChatTemplate
from macft.data.tokenization import texts
from macft.data.tokenization.conversations import Fitted, fit_examples, special_in_content
from macft.data.tokenization.pairs import FittedPair, SkipReason, fit_pairs
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import UsageError
from macft.text import plural


def preview(
    examples: Sequence[Example],
    index: int,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    cutoff_len: int,
    train_on_prompt: bool = False,
    mask_history: bool = False,
    console: Console,
) -> None:
    """Print example `index` (from 0) as it is trained on, then a line of counts.

    Trained text is green where the console has colors, else it stands in ⟦ ⟧.
    """
    shown = preview_json(
        examples,
        index,
        tokenizer,
        template,
        cutoff_len=cutoff_len,
        train_on_prompt=train_on_prompt,
        mask_history=mask_history,
    )
    _print(console, shown["pieces"])
    console.print(Text(_counts(shown)), soft_wrap=True, highlight=False)


def preview_pair(
    examples: Sequence[PairExample],
    index: int,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    cutoff_len: int,
    console: Console,
) -> None:
    """Print pair `index` (from 0) as it is trained on: the prompt once, both answers, a line of counts."""
    shown = preview_pair_json(examples, index, tokenizer, template, cutoff_len=cutoff_len)
    for side in ("prompt", "chosen", "rejected"):
        console.print(Text(f"--- {side}"), soft_wrap=True, highlight=False)
        _print(console, shown[side]["pieces"])
    console.print(Text(_pair_counts(shown)), soft_wrap=True, highlight=False)


def preview_text(
    rows: Sequence[formats.Text], index: int, tokenizer: Tokenizer, *, cutoff_len: int, console: Console
) -> None:
    """Print text `index` (from 0) as it is trained on, its end token included, then a line of counts."""
    shown = preview_text_json(rows, index, tokenizer, cutoff_len=cutoff_len)
    _print(console, shown["pieces"])
    special = ", ".join(shown["special_in_content"]) or "none"
    console.print(
        Text(
            f"{shown['source']}: {shown['num_tokens']} tokens, {shown['num_trained']} trained, "
            f"{plural(shown['rows'], 'row')} of cutoff_len {cutoff_len}, special tokens inside content: {special}"
        ),
        soft_wrap=True,
        highlight=False,
    )


def _print(console: Console, pieces: Sequence[dict[str, Any]]) -> None:
    colored = console.color_system is not None and not console.no_color
    text = Text()
    for piece in pieces:
        visible = _visible(piece["text"])
        if piece["trained"] and colored:
            text.append(visible, style="bold green")
        else:
            text.append(f"⟦{visible}⟧" if piece["trained"] else visible)
    # soft_wrap leaves the lines to the terminal, so that a pipe gets the text as it is
    console.print(text, soft_wrap=True, highlight=False)


def preview_json(
    examples: Sequence[Example],
    index: int,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    cutoff_len: int,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> dict[str, Any]:
    """The same as a JSON object: source, pieces of text (trained or not), token ids, mask and counts."""
    _check_index(index, len(examples))
    example = examples[index]
    [fitted] = fit_examples(
        [example],
        tokenizer,
        template,
        cutoff_len=cutoff_len,
        train_on_prompt=train_on_prompt,
        mask_history=mask_history,
    )
    special = special_in_content([example], tokenizer)
    return {
        "source": example.source,
        "pieces": _pieces(fitted),
        "tokens": fitted.encoded.ids,
        "loss_mask": fitted.loss_mask.tolist(),
        "num_tokens": len(fitted.encoded.ids),
        "num_trained": int(fitted.loss_mask.sum()),
        "boundary_tokens": fitted.boundary_tokens,
        "shortened": fitted.shortened,
        "answer_cut": fitted.answer_cut,
        "special_in_content": [token for _, tokens in special for token in tokens],
    }


def preview_pair_json(
    examples: Sequence[PairExample], index: int, tokenizer: Tokenizer, template: ChatTemplate, *, cutoff_len: int
) -> dict[str, Any]:
    """The same as a JSON object: the prompt, and the two answers without it, each with pieces and token ids."""
    _check_index(index, len(examples))
    example = examples[index]
    [fitted] = fit_pairs([example], tokenizer, template, cutoff_len=cutoff_len)
    special = special_in_content([example], tokenizer)
    length = fitted.prompt_length
    prompt, chosen = _part(fitted.chosen, 0, length), _part(fitted.chosen, length, None)
    return {
        "source": example.source,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": _part(fitted.rejected, length, None),
        "boundary_tokens": fitted.chosen.boundary_tokens + fitted.rejected.boundary_tokens,
        "shortened": fitted.shortened,
        "fate": _fate(fitted),
        "special_in_content": [token for _, tokens in special for token in tokens],
    }


def preview_text_json(
    rows: Sequence[formats.Text], index: int, tokenizer: Tokenizer, *, cutoff_len: int
) -> dict[str, Any]:
    """The same as a JSON object: source, pieces, token ids, mask and counts; `rows`: how many it fills."""
    _check_index(index, len(rows))
    return texts.preview_text_json(rows, index, tokenizer, cutoff_len=cutoff_len)


def _check_index(index: int, rows: int) -> None:
    if not 0 <= index < rows:
        raise UsageError(f"row {index}: there are {rows} rows, expected 0 to {rows - 1}")


def _part(row: Fitted, start: int, stop: int | None) -> dict[str, Any]:
    """Some tokens of a row; for an answer also whether its end was cut."""
    tokens = row.encoded.ids[start:stop]
    part = {"pieces": _pieces(row, start, stop), "tokens": tokens, "num_tokens": len(tokens)}
    return part if start == 0 else part | {"answer_cut": row.answer_cut}


def _fate(pair: FittedPair) -> str:
    obstacles: dict[SkipReason, str] = {
        "no prompt": "refused in training: the prompt has no token of its own",
        "no answer": "left out of training: cutoff_len leaves no answer on one side",
        "nothing before the answers": "left out of training: cutoff_len leaves nothing before the answers",
    }
    if pair.skip_reason is not None:
        return obstacles[pair.skip_reason]
    lost = "user text emptied" if pair.chosen.emptied else "user text shortened" if pair.shortened else "not shortened"
    if pair.answer_cut:
        return f"{lost} and an answer cut" if pair.shortened else "an answer cut"
    return lost


def _pieces(fitted: Fitted, start: int = 0, stop: int | None = None) -> list[dict[str, Any]]:
    """The text of tokens `start` to `stop`, in runs of trained and untrained characters."""
    text, runs = fitted.rendered.text, []
    ends, mask = fitted.encoded.ends, fitted.loss_mask.tolist()
    begin = [0, *ends[:start]][-1]
    tokens = zip(ends[start:stop], mask[start:stop], strict=True)
    for trained, group in groupby(tokens, key=lambda token: token[1]):
        end = [token[0] for token in group][-1]
        if end > begin:
            runs.append({"text": text[begin:end], "trained": trained})
        begin = max(begin, end)
    return runs


def _visible(text: str) -> str:
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "⇥"
    kind = unicodedata.category(character)
    # controls could steer the terminal; formats, separators and unassigned ones cannot be seen
    if kind in ("Cc", "Cf", "Cn", "Co", "Zl", "Zp") or (kind == "Zs" and character != " "):
        return f"<U+{ord(character):04X}>"
    return character


def _counts(shown: dict[str, Any]) -> str:
    tokens, trained = shown["num_tokens"], shown["num_trained"]
    fate = "not shortened"
    if shown["shortened"]:
        fate = "user text shortened"
    if shown["answer_cut"]:
        fate = "user text emptied and the last answer cut" if shown["shortened"] else "the last answer cut"
    special = ", ".join(shown["special_in_content"]) or "none"
    return (
        f"{shown['source']}: {tokens} tokens, {trained} trained ({trained / tokens:.1%}), "
        f"{shown['boundary_tokens']} boundary_tokens, {fate}, special tokens inside content: {special}"
    )


def _pair_counts(shown: dict[str, Any]) -> str:
    prompt, chosen, rejected = (shown[side]["num_tokens"] for side in ("prompt", "chosen", "rejected"))
    special = ", ".join(shown["special_in_content"]) or "none"
    return (
        f"{shown['source']}: prompt {prompt} tokens, chosen {chosen} trained, rejected {rejected} trained, "
        f"{shown['boundary_tokens']} boundary_tokens, {shown['fate']}, special tokens inside content: {special}"
    )
