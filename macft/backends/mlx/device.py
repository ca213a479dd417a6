"""Say which device MLX computes on, in which type, and how much memory it may take."""

from __future__ import annotations

import mlx.core as mx

from macft.system import total_memory

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

# What macOS and its programs need beside a training run.
_LEFT_TO_MACOS = 3 * 10**9
# The share of the memory that MLX may keep in free buffers, to use them again.
_CACHED = 0.25


def on_gpu() -> bool:
    """Whether MLX computes on Metal (or CUDA)."""
    return mx.default_device() == mx.Device(mx.gpu)


def device_info() -> dict[str, str | int]:
    """What MLX says of the GPU; on CUDA its free memory is that of this moment."""
    return mx.device_info()


def device_name() -> str:
    """How a person knows the device: CPU, the name of the chip, or that of the NVIDIA GPU."""
    return str(device_info()["device_name"]) if on_gpu() else "CPU"


def memory_size() -> int:
    """Bytes that a run may take in all: of a Mac what Metal recommends, but not all that the machine has."""
    info = device_info()
    if "max_recommended_working_set_size" in info:
        return min(int(info["max_recommended_working_set_size"]), int(info["memory_size"]) - _LEFT_TO_MACOS)
    return int(info["total_memory"]) if "total_memory" in info else total_memory()


def free_memory() -> int:
    """Bytes that a run can still take on a GPU."""
    info = device_info()
    if "free_memory" in info:
        return int(info["free_memory"]) + mx.get_cache_memory()
    return memory_size() - mx.get_active_memory()


def bound_memory() -> None:
    """Bound what MLX keeps in free buffers on a GPU, and on Metal what it holds in memory whatever else runs."""
    if not on_gpu():
        return
    mx.set_cache_limit(int(_CACHED * memory_size()))
    if "max_recommended_working_set_size" in device_info():
        mx.set_wired_limit(memory_size())


def compute_dtype(precision: str, scales: mx.Dtype | None, notes: list[str]) -> mx.Dtype:
    """The compute type for `precision`; adds to `notes` what the user should be told of it.

    `scales` is the type of a quantized base's scales. On a GPU `auto` is that type, and bfloat16 for other models; on a
    CPU float32.
    """
    if not on_gpu():
        if precision not in ("auto", "float32"):
            notes.append(f"{precision} products are slow on MLX's CPU build: computing in float32")
        return mx.float32
    has_float16_scales = scales is not None and scales == mx.float16
    if precision == "auto":
        return mx.float16 if has_float16_scales else mx.bfloat16
    if precision == "bfloat16" and has_float16_scales:
        notes.append("this base is quantized with float16 scales, which bf16=true rounds: without it they are kept")
    return DTYPES[precision]
