"""List the training engines: what each is called, what it needs and where its code is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class Engine:
    """One training engine; nothing of it is imported before it is chosen."""

    name: str  # the value of `backend`, and the extra that installs it
    module: str  # offers what `macft.backends.base.EngineModule` asks for
    logits_module: str  # offers what `macft.backends.base.LogitsModule` asks for
    packages: tuple[str, ...]  # modules that must be importable
    accelerator: str  # "Metal" or "CUDA": where it is the one to take
    hardware: str  # the same in words
    adapter_format: str  # of the adapters that its own library reads
    gpu_check: str  # "module:function" that says whether it computes on a GPU here
    cpu_check: str | None = None  # "module:function" that says whether it is fast on this CPU; None: it always is
    quantizer: str | None = None  # the module that quantization_bit needs on a GPU
    reads_litgpt: bool = False

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install 'macft[{self.name}]'"


_ENGINES = (
    Engine(
        name="mlx",
        module="macft.backends.mlx.backend",
        logits_module="macft.backends.mlx.logits",
        packages=("mlx", "mlx_lm"),
        accelerator="Metal",
        hardware="Apple Silicon or a CPU",
        adapter_format="mlx",
        gpu_check="macft.backends.mlx.device:on_gpu",
        cpu_check="macft.backends.mlx.blas:is_fast",
    ),
    Engine(
        name="torch",
        module="macft.backends.torch.backend",
        logits_module="macft.backends.torch.logits",
        packages=("torch", "transformers", "peft"),
        accelerator="CUDA",
        hardware="an NVIDIA GPU",
        adapter_format="peft",
        gpu_check="macft.backends.torch.device:on_gpu",
        quantizer="bitsandbytes",
        reads_litgpt=True,
    ),
)

# Every engine by its name. No other line of the program decides which engines there are.
BACKENDS: Mapping[str, Engine] = {engine.name: engine for engine in _ENGINES}

_NAMES = ("auto", *BACKENDS)
if TYPE_CHECKING:
    BackendName = str
else:
    BackendName = Literal[_NAMES]
