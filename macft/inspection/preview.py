"""Print a row as training sees it, with the trained text marked."""

from __future__ import annotations

import unicodedata

from rich.console import Console
from rich.text import Text

from macft.data.tokenization.row_preview import Pieces, RowPreview


def show(preview: RowPreview, console: Console) -> None:
    """Print the text, part by part, then a line of counts.

    Trained text is green if the console has colors, else enclosed in ⟦ ⟧.
    """
    for title, pieces in preview.sections:
        if title:
            _print(console, Text(title))
        _print(console, _marked(pieces, colored=console.color_system is not None and not console.no_color))
    _print(console, Text(preview.counts))


def _print(console: Console, text: Text) -> None:
    # soft_wrap leaves the lines to the terminal, so that a pipe gets the text as it is
    console.print(text, soft_wrap=True, highlight=False)


def _marked(pieces: Pieces, *, colored: bool) -> Text:
    text = Text()
    for piece in pieces:
        visible = _visible(piece["text"])
        if piece["trained"] and colored:
            text.append(visible, style="bold green")
        else:
            text.append(f"⟦{visible}⟧" if piece["trained"] else visible)
    return text


def _visible(text: str) -> str:
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "⇥"
    kind = unicodedata.category(character)
    # control characters could steer the terminal; the others are invisible
    if kind in ("Cc", "Cf", "Cn", "Co", "Zl", "Zp") or (kind == "Zs" and character != " "):
        return f"<U+{ord(character):04X}>"
    return character
