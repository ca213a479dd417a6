"""Read the rows of a parquet, Arrow or CSV file, with only the requested columns."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macft.data.sources.text import kind, lines, nearest_file, read_bytes
from macft.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

TABLES = (".parquet", ".arrow", ".csv")
# rows converted at once: enough to be fast, few enough for rows of whole books
_BATCH = 256
_ARROW_FILE = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def is_table(path: Path) -> bool:
    """Whether the file has named columns, the same for all rows."""
    return kind(path) in TABLES


def table_columns(path: Path) -> list[str]:
    """The names of a table's columns. Raises DataError when the file is missing or damaged."""
    if kind(path) == ".csv":
        for _, header, _ in _csv_records(path):
            return _without_doubles(path, header)
        raise DataError(f"{path}: the file is empty, expected a header and rows")
    with _problems_named(path), _arrow(path) as source:
        return _without_doubles(path, source.names)


def count_table(path: Path) -> int | None:
    """The number of rows in the header of a parquet file; None for other files."""
    if path.suffix != ".parquet":
        return None
    import pyarrow.parquet as pq

    with _problems_named(path):
        return int(pq.ParquetFile(path).metadata.num_rows)


def table_rows(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """(number from 1, row, problem) of each row, with only the named columns; in bounded memory.

    The number is a line in a CSV file. Raises DataError when the file is missing, damaged or cut short.
    """
    if kind(path) == ".csv":
        yield from _csv_rows(path, columns)
        return
    number = 0
    with _problems_named(path), _arrow(path) as source:
        expected = [name for name in _without_doubles(path, source.names) if columns is None or name in columns]
        for batch in source.batches(expected):
            sparse = [field.name for field in batch.schema if str(field.type).count("struct<") > 1]
            for row in _plain(batch):
                number += 1
                for name in sparse:
                    row[name] = _without_nulls(row[name])
                yield number, row, ""


def _without_doubles(path: Path, names: list[str]) -> list[str]:
    """The names of the columns. Raises DataError where two have the same, so that one would be lost."""
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise DataError(f'{path}: two columns are named "{double}"; rename or remove one')
    return names


def _plain(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    if not names:
        yield from ({} for _ in range(batch.num_rows))
    for start in range(0, batch.num_rows, _BATCH):
        columns = [column.to_pylist() for column in batch.slice(start, _BATCH).columns]
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))


def _without_nulls(value: Any) -> Any:
    """The value without the null keys that a table adds because all objects of a column have the same keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


class _Parquet:
    def __init__(self, file: Any) -> None:
        self._file = file
        self.names: list[str] = file.schema_arrow.names

    def batches(self, expected: list[str]) -> Iterator[pa.RecordBatch]:
        yield from self._file.iter_batches(batch_size=_BATCH, columns=expected)


class _Arrow:
    """An Arrow file or stream; its columns are known only once it is open, so each read opens it again."""

    def __init__(self, path: Path, data: pa.Buffer) -> None:
        import pyarrow as pa

        self._path = path
        self._data = data
        self._open: Any = pa.ipc.open_file if data[:6].to_pybytes() == _ARROW_FILE else pa.ipc.open_stream
        self._is_file = self._open is pa.ipc.open_file
        if not self._is_file and data[-8:].to_pybytes() != _STREAM_END:
            raise DataError(f"{path}: cut short: the Arrow stream has no end mark; copy or write the file again")
        with self._open(data) as reader:
            self.names: list[str] = reader.schema.names

    def batches(self, expected: list[str]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        options = pa.ipc.IpcReadOptions(included_fields=[self.names.index(name) for name in expected])
        with self._open(self._data, options=options) as reader:
            if self._is_file:
                for i in range(reader.num_record_batches):
                    yield reader.get_batch(i)
            else:
                yield from reader


@contextmanager
def _arrow(path: Path) -> Iterator[_Parquet | _Arrow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".gz":
        data = pa.py_buffer(read_bytes(path))
    elif path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty, expected at least one row")
    else:
        with pa.memory_map(str(path)) as file:
            data = file.read_buffer()
    if kind(path) == ".parquet":
        with pq.ParquetFile(pa.BufferReader(data)) as parquet:
            yield _Parquet(parquet)
    else:
        yield _Arrow(path, data)


@contextmanager
def _problems_named(path: Path) -> Iterator[None]:
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f"{path}: reading it needs pyarrow, not installed: pip install pyarrow") from None
    expected = "a whole parquet file" if kind(path) == ".parquet" else "a whole Arrow file or stream"
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{nearest_file(path)}") from None
    except (pa.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path}: damaged or cut short, expected {expected} ({reason}); copy the file again") from None


def _csv_records(path: Path) -> Iterator[tuple[int, list[str], str]]:
    """(line it starts on, fields, problem) of each record."""
    problems: list[str] = []

    def texts() -> Iterator[str]:
        for _, text, problem in lines(path):
            if problem:
                problems.append(problem)
            yield text

    # many articles exceed the module's limit of 131072 characters per field
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(texts(), strict=True)
    start = 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield start, [], f"not CSV ({error})"
            return
        if problems:
            yield start, [], problems.pop()
        elif fields:
            yield start, fields, ""
        start = reader.line_num + 1


def _csv_rows(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    header: list[str] | None = None
    for number, fields, problem in _csv_records(path):
        if problem:
            yield number, None, problem
        elif header is None:
            header = _without_doubles(path, fields)
        elif len(fields) != len(header):
            yield number, None, f"found {len(fields)} fields, expected {len(header)} as in the header"
        else:
            pairs = zip(header, fields, strict=True)
            yield number, {name: text for name, text in pairs if columns is None or name in columns}, ""
