"""Read the tensors of a file that torch.save wrote, without unpickling it.

The pickle is read as a list of instructions. Those that build dictionaries of tensors are followed by hand,
and every other one is refused: no name in the file is ever imported or called.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from macft.errors import ModelError, raise_problems
from macft.weights.tensors.lazy import LazyTensor, mapped_tensor

_MAX_PICKLE = 100_000_000  # bytes; names and shapes of a large model take less than one million
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_DICT = "collections OrderedDict"
_STORAGES: dict[str, np.dtype[Any]] = {
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class _Name:
    """A class or function that the file names; it is never looked up."""

    text: str


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype[Any]
    key: str
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _UnsupportedPickleError(Exception):
    """The pickle holds something that no dictionary of tensors needs."""


_MARK = object()


@dataclass
class _Machine:
    """The stack and the memo after the instructions followed so far."""

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop(self, count: int) -> list[Any]:
        found = self.stack[-count:]
        if len(found) < count:
            raise IndexError
        del self.stack[-count:]
        return found

    def pop_to_mark(self) -> list[Any]:
        found: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            found.append(value)
        return found[::-1]


def open_torch_file(path: Path) -> list[LazyTensor]:
    """The tensors of a state dictionary, or of the one a checkpoint holds as "model", in the order of the file.

    Raises ModelError for a file that is damaged, compressed or of the old format, and for one whose pickle holds
    anything but dictionaries of dense tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            content = _checked_pickle(path, archive, entries)
    except zipfile.BadZipFile:
        raise ModelError(
            f"{path}: not written by torch.save, written by a PyTorch before 1.6, or cut short; save it again"
        ) from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    found = _follow(path, content)
    state = found.get("model", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not state:
        raise ModelError(f"{path}: holds no dictionary of tensors")
    problems: list[str] = []
    tensors = [_lazy(path, str(name), value, entries, problems) for name, value in state.items()]
    raise_problems(f"{path}: these entries cannot be read:", problems)
    return [tensor for tensor in tensors if tensor is not None]


def _checked_pickle(path: Path, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> bytes:
    found = entries.get("data.pkl")
    if found is None:
        raise ModelError(f"{path}: a zip file without data.pkl; expected a file of torch.save")
    if found.file_size > _MAX_PICKLE:
        raise ModelError(f"{path}: data.pkl has {found.file_size} bytes, more than a dictionary of tensors takes")
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
        raise ModelError(f"{path}: compressed, which torch.save does not do; save it again")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise ModelError(f"{path}: its numbers are big-endian; save it again on a little-endian machine")
    return archive.read(found)


def _follow(path: Path, content: bytes) -> Any:
    """The value that the pickle builds, of dictionaries, lists, tuples, constants and `_Tensor`."""
    machine = _Machine()
    try:
        for code, argument, _ in pickletools.genops(content):
            if code.name == "STOP":
                return machine.stack.pop()
            if code.name not in _FOLLOWED:
                raise _UnsupportedPickleError(f"the instruction {code.name}")
            _FOLLOWED[code.name](machine, argument)
    except _UnsupportedPickleError as error:
        raise ModelError(
            f"{path}: refused, as its pickle holds {error}, which no dictionary of tensors needs; save only "
            "the state_dict() of the model"
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError):
        pass
    raise ModelError(f"{path}: its pickle is damaged; copy the file again")


def _reduce(machine: _Machine, _: Any) -> None:
    target, arguments = machine.pop(2)
    name = target.text if isinstance(target, _Name) else repr(target)
    if name == _TENSOR:
        storage, offset, shape, strides = arguments[:4]
        whole = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in whole):
            raise ValueError
        machine.stack.append(_Tensor(storage, offset, tuple(shape), tuple(strides)))
    elif name == _PARAMETER:
        machine.stack.append(arguments[0])
    elif name == _DICT and arguments == ():
        machine.stack.append({})
    else:
        raise _UnsupportedPickleError(f"a call of {name.replace(' ', '.')}")


def _name(machine: _Machine, text: str) -> None:
    if text not in _STORAGES and text not in (_TENSOR, _PARAMETER, _DICT):
        raise _UnsupportedPickleError(f"the name {text.replace(' ', '.')}")
    machine.stack.append(_Name(text))


def _stack_name(machine: _Machine, _: Any) -> None:
    module, attribute = machine.pop(2)
    _name(machine, f"{module} {attribute}")


def _storage(machine: _Machine, _: Any) -> None:
    kind, storage_type, key, _, numel = machine.stack.pop()
    if kind != "storage" or not isinstance(numel, int):
        raise ValueError
    machine.stack.append(_Storage(_STORAGES[storage_type.text], str(key), numel))


def _set_items(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, dict) or not all(isinstance(key, str | int) for key in items[::2]):
        raise ValueError
    target.update(zip(items[::2], items[1::2], strict=True))


def _extend(machine: _Machine, items: list[Any]) -> None:
    if not isinstance(machine.stack[-1], list):
        raise ValueError
    machine.stack[-1].extend(items)


def _build(machine: _Machine, _: Any) -> None:
    # attributes of a state dictionary: the versions of its modules
    machine.stack.pop()
    if not isinstance(machine.stack[-1], dict):
        raise _UnsupportedPickleError("attributes of an object")


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(tuple(machine.pop(count)))


def _push(make: Callable[[Any], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.stack.append(make(argument))


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


_FOLLOWED: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda _machine, _argument: None),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        _push(lambda argument: argument),
    ),
    "NONE": _push(lambda _: None),
    "NEWTRUE": _push(lambda _: True),
    "NEWFALSE": _push(lambda _: False),
    "EMPTY_DICT": _push(lambda _: {}),
    "EMPTY_LIST": _push(lambda _: []),
    "EMPTY_TUPLE": _push(lambda _: ()),
    "MARK": _push(lambda _: _MARK),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    "MEMOIZE": lambda machine, _: _put(machine, len(machine.memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, argument: machine.stack.append(machine.memo[argument])),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "SETITEM": lambda machine, _: _set_items(machine, machine.pop(2)),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.pop_to_mark()),
    "APPEND": lambda machine, _: _extend(machine, machine.pop(1)),
    "APPENDS": lambda machine, _: _extend(machine, machine.pop_to_mark()),
    "GLOBAL": _name,
    "STACK_GLOBAL": _stack_name,
    "BINPERSID": _storage,
    "REDUCE": _reduce,
    "BUILD": _build,
}


def _lazy(
    path: Path, name: str, value: Any, entries: dict[str, zipfile.ZipInfo], problems: list[str]
) -> LazyTensor | None:
    """The tensor, or None with the reason in `problems`."""
    if not isinstance(value, _Tensor):
        problems.append(f"{name} is a {type(value).__name__}, expected a tensor")
        return None
    if not _is_contiguous(value):
        problems.append(f"{name} is a strided view {list(value.shape)}; save a contiguous copy")
        return None
    info = entries.get(f"data/{value.storage.key}")
    size = value.storage.dtype.itemsize
    count = prod(value.shape)
    if info is None or (value.offset + count) * size > info.file_size:
        problems.append(f"{name}: the file has no {count * size} bytes for it")
        return None
    start = _data_start(path, info) + value.offset * size
    return mapped_tensor(path, name, value.storage.dtype, value.shape, start)


def _is_contiguous(tensor: _Tensor) -> bool:
    expected = 1
    for length, stride in zip(tensor.shape[::-1], tensor.strides[::-1], strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _data_start(path: Path, info: zipfile.ZipInfo) -> int:
    """The offset of an entry's bytes: after its local header, which alone gives its own size."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        lengths = file.read(4)
    return info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
