"""Turn an out-of-memory error of MLX into one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from macft.backends.memory import Phase, out_of_memory_text, timeout_text
from macft.backends.mlx import device
from macft.errors import ModelError
from macft.system import peak_process_memory

# Metal, its allocator, CUDA, the allocator of the CPU
_OUT_OF_MEMORY = (
    "Insufficient Memory",
    "maximum allowed buffer size",
    "Resource limit",
    "out of memory",
    "Unable to allocate",
)
# macOS ends what keeps its GPU from drawing the screen
_TIMEOUT = ("Timeout", "Impacting Interactivity")


@contextmanager
def explaining_out_of_memory(doing: str, phase: Phase = "train") -> Iterator[None]:
    """Raise ModelError, one line with numbers and what to change, when the device runs out of memory in this block."""
    try:
        yield
    except RuntimeError as error:
        name = device.device_name() if device.on_gpu() else "this machine"
        if is_out_of_memory(error):
            used = mx.get_active_memory() + mx.get_cache_memory() if device.on_gpu() else peak_process_memory()
            raise ModelError(out_of_memory_text(name, doing, used, device.memory_size(), phase)) from None
        if any(words in str(error) for words in _TIMEOUT):
            raise ModelError(timeout_text(name, doing, phase)) from None
        raise


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of MLX says that memory is short; it has no class for it."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
