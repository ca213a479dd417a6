"""Choose the device and the compute type, and say why a GPU cannot be used."""

from __future__ import annotations

import torch

from macft.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device() -> torch.device:
    """CUDA, then MPS, then the CPU; raises ModelError for a GPU that this build of PyTorch has no code for."""
    if torch.cuda.is_available():
        _check_capability()
        # cuDNN builds a plan for every new shape of a batch, which takes longer than its kernels save
        torch.backends.cuda.enable_cudnn_sdp(False)
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def on_gpu() -> bool:
    """Whether PyTorch computes on a GPU here; raises as `pick_device`."""
    return pick_device().type != "cpu"


def _check_capability() -> None:
    """What torch itself finds out only at the first kernel, as "no kernel image"."""
    major, minor = torch.cuda.get_device_capability()
    built_for = torch.cuda.get_arch_list()
    binary = any(_parts(arch)[0] == major and _parts(arch)[1] <= minor for arch in built_for if arch.startswith("sm_"))
    # code for a virtual architecture is compiled on the way, for this GPU and for newer ones
    portable = any(_parts(arch) <= (major, minor) for arch in built_for if arch.startswith("compute_"))
    if built_for and not binary and not portable:
        raise ModelError(
            f"{torch.cuda.get_device_name()} is an sm_{major}{minor} GPU, and torch {torch.__version__} is built for "
            f"{', '.join(built_for)}: install a build for it (https://pytorch.org/get-started/previous-versions/), or "
            "hide the GPU with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )


def _parts(arch: str) -> tuple[int, int]:
    number = "".join(c for c in arch.rpartition("_")[2] if c.isdigit())
    return int(number[:-1]), int(number[-1])


def device_name(device: torch.device) -> str:
    """How a person knows the device: CPU, MPS, or the name of the NVIDIA GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def idle_gpus_note(device: torch.device) -> list[str]:
    """What to tell of GPUs that are visible and not used."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2:
        return []
    return [f"{count} GPUs visible, 1 used: CUDA_VISIBLE_DEVICES=1 would take the second, for another run beside this"]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "mps"


def compute_dtype(precision: str, device: torch.device, notes: list[str]) -> torch.dtype:
    """The compute type for `precision`; adds to `notes` what the user should be told of it.

    On a GPU `auto` and `bfloat16` are bfloat16, or float16 with loss scaling on one that lacks it (T4, V100); on a CPU
    `auto` is float32.
    """
    if precision == "auto" and device.type == "cpu":
        return torch.float32
    if precision in ("auto", "bfloat16") and device.type != "cpu":
        if has_bfloat16(device):
            return torch.bfloat16
        notes.append("this GPU has no bfloat16: computing in float16, with a scaled loss")
        return torch.float16
    if precision == "float16" and device.type == "cpu":
        notes.append("float16 is not trainable on the CPU: computing in float32")
        return torch.float32
    return DTYPES[precision]


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on a GPU."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def empty_cache(device: torch.device) -> None:
    """Give blocks that PyTorch keeps for later back to a GPU."""
    if device.type == "mps":
        torch.mps.empty_cache()
    elif device.type == "cuda":
        torch.cuda.empty_cache()
