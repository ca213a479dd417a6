"""Describe one row as training sees it: its text with the trained parts, its tokens and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from macft.data.formats.conversations import Example
from macft.data.formats.feedback import FeedbackExample
from macft.data.formats.pairs import PairExample
from macft.data.formats.texts import PlainText
from macft.data.tokenization.conversations import FittedRow, fit_examples
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.feedback import only_last
from macft.data.tokenization.pairs import SKIP_REASONS, FittedPair, fit_pairs
from macft.data.tokenization.report import SpecialTokens
from macft.data.tokenization.texts import end_tokens
from macft.text import plural

# runs of text, each {"text": str, "trained": bool}
Pieces = list[dict[str, Any]]


@dataclass(frozen=True)
class RowPreview:
    """A row as JSON, and for a terminal: pieces of text under titles (which may be empty), and a line of counts."""

    value: dict[str, Any]
    sections: tuple[tuple[str, Pieces], ...]
    counts: str


def preview_example(example: Example, encoding: Encoding) -> RowPreview:
    """Preview a conversation. Raises DataError as rendering does."""
    [fitted] = fit_examples([example], encoding)
    value = {
        "source": example.source,
        "pieces": _pieces(fitted),
        **_tokens(fitted.encoded.ids, fitted.loss_mask.tolist()),
        "boundary_tokens": fitted.boundary_tokens,
        "shortened": fitted.shortened,
        "answer_cut": fitted.answer_cut,
        "special_in_content": SpecialTokens(encoding.tokenizer).all_in(example),
    }
    lost = "user text shortened" if fitted.shortened else "not shortened"
    if fitted.answer_cut:
        lost = "user text emptied and the last answer cut" if fitted.shortened else "the last answer cut"
    tokens, trained = value["num_tokens"], value["num_trained"]
    shown = f"{tokens} tokens, {trained} trained ({trained / tokens:.1%}), {fitted.boundary_tokens} boundary tokens"
    return RowPreview(value, (("", value["pieces"]),), f"{example.source}: {shown}, {lost}, {_special(value)}")


def preview_feedback(example: FeedbackExample, encoding: Encoding) -> RowPreview:
    """Preview a rated answer with its conversation. Raises DataError as rendering does."""
    shown = preview_example(example, only_last(encoding))
    rating = "desirable" if example.is_desirable else "undesirable"
    value = {**shown.value, "is_desirable": example.is_desirable}
    return RowPreview(value, shown.sections, f"{shown.counts}, rated {rating}")


def preview_text(text: PlainText, encoding: Encoding) -> RowPreview:
    """Preview a whole text with its end token; `rows` in the value is how many it fills."""
    tokenizer = encoding.tokenizer
    tail, opened = end_tokens(tokenizer), tokenizer.opened(text.text)
    encoded = tokenizer.encode(opened, is_input=True)
    first = encoded.ends[0] if encoded.ends else 0
    trained = opened[first:] + tokenizer.decode(tail, skip_special=False)
    pieces = [{"text": opened[:first], "trained": False}, {"text": trained, "trained": True}]
    ids = [*encoded.ids, *tail]
    value = {
        "source": text.source,
        "pieces": [piece for piece in pieces if piece["text"]],
        **_tokens(ids, [False] + [True] * (len(ids) - 1)),
        "boundary_tokens": 0,
        "shortened": False,
        "answer_cut": False,
        "special_in_content": SpecialTokens(tokenizer).all_in(text),
        "rows": -(-len(ids) // encoding.cutoff_len),
    }
    rows = f"{plural(value['rows'], 'row')} of cutoff_len {encoding.cutoff_len}"
    counts = f"{value['num_tokens']} tokens, {value['num_trained']} trained, {rows}, {_special(value)}"
    return RowPreview(value, (("", value["pieces"]),), f"{text.source}: {counts}")


def preview_pair(pair: PairExample, encoding: Encoding) -> RowPreview:
    """Preview a pair: the prompt once, then both answers. Raises DataError as rendering does."""
    [fitted] = fit_pairs([pair], encoding)
    length = fitted.prompt_length
    parts = {
        "prompt": _part(fitted.chosen, 0, length),
        "chosen": _part(fitted.chosen, length, None),
        "rejected": _part(fitted.rejected, length, None),
    }
    boundary_tokens = fitted.chosen.boundary_tokens + fitted.rejected.boundary_tokens
    value = {
        "source": pair.source,
        **parts,
        "boundary_tokens": boundary_tokens,
        "shortened": fitted.shortened,
        "fate": _lost(fitted, encoding.cutoff_len),
        "special_in_content": SpecialTokens(encoding.tokenizer).all_in(pair),
    }
    prompt, chosen, rejected = (part["num_tokens"] for part in parts.values())
    counts = (
        f"{pair.source}: prompt {prompt} tokens, chosen {chosen} trained, rejected {rejected} trained, "
        f"{boundary_tokens} boundary tokens, {value['fate']}, {_special(value)}"
    )
    return RowPreview(value, tuple((f"--- {name}", part["pieces"]) for name, part in parts.items()), counts)


def _tokens(ids: Sequence[int], mask: Sequence[bool]) -> dict[str, Any]:
    return {"tokens": ids, "loss_mask": mask, "num_tokens": len(ids), "num_trained": sum(mask)}


def _special(value: dict[str, Any]) -> str:
    return f"special tokens inside content: {', '.join(value['special_in_content']) or 'none'}"


def _part(row: FittedRow, start: int, stop: int | None) -> dict[str, Any]:
    """Some tokens of a row; for an answer, also whether its end was cut."""
    tokens = row.encoded.ids[start:stop]
    part = {"pieces": _pieces(row, start, stop), "tokens": tokens, "num_tokens": len(tokens)}
    return part if start == 0 else part | {"answer_cut": row.answer_cut}


def _lost(pair: FittedPair, cutoff_len: int) -> str:
    if pair.skip_reason:
        reason = SKIP_REASONS[pair.skip_reason - 1]
        what = "refused in training" if reason.is_refusal else "left out of training"
        return f"{what}: {reason.of_row.format(cutoff_len=cutoff_len)}"
    lost = "user text emptied" if pair.chosen.emptied else "user text shortened" if pair.shortened else "not shortened"
    if pair.answer_cut:
        return f"{lost} and an answer cut" if pair.shortened else "an answer cut"
    return lost


def _pieces(fitted: FittedRow, start: int = 0, stop: int | None = None) -> Pieces:
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
