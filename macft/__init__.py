"""Fine-tune language models with LoRA on MLX and PyTorch from one YAML file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from macft.api.conversions import convert, export_merged
    from macft.api.exports import export_gguf, export_ollama
    from macft.api.models import LanguageModel, TokenLogp, load_model
    from macft.api.runs import load_config, train
    from macft.backends.base import Sampling
    from macft.config.settings import Settings
    from macft.errors import MacftError

__version__ = "0.1.0"
__all__ = [
    "LanguageModel",
    "MacftError",
    "Sampling",
    "Settings",
    "TokenLogp",
    "convert",
    "export_gguf",
    "export_merged",
    "export_ollama",
    "load_config",
    "load_model",
    "train",
]

# public name -> the module that is imported when it is first used: importing macft alone stays fast
_MODULES = {
    "convert": "macft.api.conversions",
    "export_merged": "macft.api.conversions",
    "export_gguf": "macft.api.exports",
    "export_ollama": "macft.api.exports",
    "LanguageModel": "macft.api.models",
    "TokenLogp": "macft.api.models",
    "load_model": "macft.api.models",
    "load_config": "macft.api.runs",
    "train": "macft.api.runs",
    "Sampling": "macft.backends.base",
    "Settings": "macft.config.settings",
    "MacftError": "macft.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'macft' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
