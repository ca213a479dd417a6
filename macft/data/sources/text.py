"""Read text files, gzipped or not, and locate every decoding error."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import IO, cast

from macft.errors import DataError

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def kind(path: Path) -> str:
    """The suffix that says what a file holds, without `.gz`: `.jsonl`, `.parquet`, ..."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def nearest_file(path: Path) -> str:
    """A hint that names the file beside `path` with the most similar name, or nothing."""
    folder = path.parent
    names = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file open for reading, unpacked if its name ends in .gz.

    Raises DataError: file missing or unreadable, and whatever gzip finds wrong while it is read.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as unpacked:
                yield cast(IO[bytes], unpacked)
        else:
            with path.open("rb") as file:
                yield file
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{nearest_file(path)}") from None
    except EOFError:
        raise DataError(f"{path}: cut short: the gzip data end before their end mark; copy the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not gzip data ({error}); correct its name or pack it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def lines(path: Path) -> Iterator[tuple[int, str, str]]:
    r"""(number from 1, text, problem) of each line of a UTF-8 file; the text is empty where there is a problem.

    Only \n ends a line: JSON strings may contain U+2028 and the like. A byte order mark is dropped.
    """
    with opened(path) as file:
        for number, content in enumerate(file, start=1):
            if number == 1:
                if content.startswith(_UTF16):
                    raise DataError(f"{path}: UTF-16, not UTF-8; save the file as UTF-8")
                content = content.removeprefix(_BOM)
            try:
                yield number, content.decode("utf-8"), ""
            except UnicodeDecodeError as error:
                yield number, "", _not_utf8(content, error.start)


def read_bytes(path: Path) -> bytes:
    """All bytes of a file."""
    with opened(path) as file:
        return file.read()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte order mark. Raises DataError with the line that is not UTF-8."""
    content = read_bytes(path)
    if content.startswith(_UTF16):
        raise DataError(f"{path}: UTF-16, not UTF-8; save the file as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # the error's position does not count the mark
        at = error.start + (len(_BOM) if content.startswith(_BOM) else 0)
        start = content.rfind(b"\n", 0, at) + 1
        end = content.find(b"\n", at)
        line = content[start : len(content) if end < 0 else end]
        number = content.count(b"\n", 0, at) + 1
        raise DataError(f"{path}: line {number}: {_not_utf8(line, at - start)}") from None


def _not_utf8(line: bytes, at: int) -> str:
    found = f"not UTF-8 (byte 0x{line[at]:02x} at byte {at + 1} of the line)"
    try:
        # GB18030 decodes nearly any bytes, so require a Chinese character
        is_chinese = any("\u4e00" <= character <= "\u9fff" for character in line.decode("gb18030"))
    except UnicodeDecodeError:
        is_chinese = False
    return f"{found}; {'it looks like GBK: ' if is_chinese else ''}save the file as UTF-8"
