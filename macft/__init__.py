"""Fine-tune language models with LoRA on MLX and PyTorch from one YAML file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from macft.api.conversions import convert as convert
    from macft.api.conversions import export_merged as export_merged
    from macft.api.exports import export_gguf as export_gguf
    from macft.api.exports import export_ollama as export_ollama
    from macft.api.models import LanguageModel as LanguageModel
    from macft.api.models import TokenLogp as TokenLogp
    from macft.api.models import load_model as load_model
    from macft.backends.base import Sampling as Sampling
    from macft.config.load import load_config as load_config
    from macft.config.settings import Settings as Settings
    from macft.errors import MacftError as MacftError
    from macft.training.run import train as train

__version__ = "0.1.0"

# public name -> the module that is imported when it is first used: importing macft alone stays fast
_MODULES = {
    "convert": "macft.api.conversions",
    "export_merged": "macft.api.conversions",
    "export_gguf": "macft.api.exports",
    "export_ollama": "macft.api.exports",
    "LanguageModel": "macft.api.models",
    "TokenLogp": "macft.api.models",
    "load_model": "macft.api.models",
    "Sampling": "macft.backends.base",
    "load_config": "macft.config.load",
    "Settings": "macft.config.settings",
    "MacftError": "macft.errors",
    "train": "macft.training.run",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'macft' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
