"""One example in; its rendered text with the trained tokens marked, for a terminal or as JSON, out."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from macft.data.formats import Example
from macft.data.template import ChatTemplate
from macft.data.tokenize import Fitted, fit_examples, special_in_content
from macft.data.tokenizer import Tokenizer
from macft.errors import UsageError


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

    Trained text is green where the console has colours, else it stands in ⟦ ⟧.
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
    coloured = console.color_system is not None and not console.no_color
    text = Text()
    for piece in shown["pieces"]:
        visible = _visible(piece["text"])
        if piece["trained"] and coloured:
            text.append(visible, style="bold green")
        else:
            text.append(f"⟦{visible}⟧" if piece["trained"] else visible)
    # soft_wrap leaves the lines to the terminal, so that a pipe gets the text as it is
    console.print(text, soft_wrap=True, highlight=False)
    console.print(Text(_counts(shown)), soft_wrap=True, highlight=False)


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
    if not 0 <= index < len(examples):
        raise UsageError(f"row {index}: there are {len(examples)} rows, wanted 0 to {len(examples) - 1}")
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
        "straddling": fitted.straddling,
        "shortened": fitted.shortened,
        "answer_cut": fitted.answer_cut,
        "special_in_content": [token for _, tokens in special for token in tokens],
    }


def _pieces(fitted: Fitted) -> list[dict[str, Any]]:
    """The text up to the last token, in runs of trained and untrained characters."""
    text, runs, start = fitted.rendered.text, [], 0
    tokens = zip(fitted.encoded.ends, fitted.loss_mask.tolist(), strict=True)
    for trained, group in groupby(tokens, key=lambda token: token[1]):
        end = [token[0] for token in group][-1]
        if end > start:
            runs.append({"text": text[start:end], "trained": trained})
        start = max(start, end)
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
        f"{shown['straddling']} straddling, {fate}, special tokens inside content: {special}"
    )
