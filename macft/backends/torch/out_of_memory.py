"""Turn an out-of-memory error of PyTorch into one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from macft.backends.memory import Phase, out_of_memory_text
from macft.backends.torch.device import device_name
from macft.errors import ModelError
from macft.system import peak_process_memory, total_memory


@contextmanager
def explaining_out_of_memory(device: torch.device, doing: str, phase: Phase = "train") -> Iterator[None]:
    """Raise ModelError, one line with numbers and what to change, when the device runs out of memory in this block.

    So are other errors of the device itself, which say nothing about the model.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            name, used, total = _in_use(device)
            raise ModelError(out_of_memory_text(name, doing, used, total, phase)) from None
        if isinstance(error, torch.AcceleratorError):
            first = str(error).partition("\n")[0]
            raise ModelError(
                f"{device_name(device)} failed {doing}: {first}; macft doctor says what it lacks"
            ) from error
        raise


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of PyTorch says that memory is short; only CUDA has a class for it."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


def _in_use(device: torch.device) -> tuple[str, int, int]:
    """The device's name, and the bytes in use and in all."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return torch.cuda.get_device_name(device), total - free, total
    if device.type == "mps":
        return "the Mac's GPU", torch.mps.driver_allocated_memory(), torch.mps.recommended_max_memory()
    return "this machine", peak_process_memory(), total_memory()
