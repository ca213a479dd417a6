"""Check, before any data is read, that the engine can train the model on this machine."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

from macft.backends import choose_backend, unused_gpu
from macft.backends.nvidia import visible_cards
from macft.engines import BACKENDS
from macft.errors import MissingPackageError, UsageError
from macft.weights.folder import ModelFolder
from macft.weights.model_config import read_config
from macft.weights.source import open_model, refuse_foreign_quantization

# Above this, training on a CPU beside a GPU is a mistake, not patience.
_MOST_ON_CPU = 1_000_000_000


def check_machine(backend: str, models: Sequence[ModelFolder], quantization_bit: int | None) -> None:
    """Raise MacftError for what would otherwise only show once the data is tokenized.

    That is: weights in a form that is not read, a large model on the CPU beside an NVIDIA GPU that is not used, and no
    quantizer for `quantization_bit`.
    """
    for model in models:
        refuse_foreign_quantization(model.path, read_config(model.path))
    if not visible_cards():
        return
    backend = choose_backend(backend)
    if reason := unused_gpu(backend):
        _refuse_large(models, reason)
        return
    quantizer = BACKENDS[backend].quantizer
    if quantization_bit is not None and quantizer is not None and importlib.util.find_spec(quantizer) is None:
        raise MissingPackageError(f"quantization_bit on CUDA needs {quantizer}: pip install {quantizer}")


def _refuse_large(models: Sequence[ModelFolder], reason: str) -> None:
    for model in models:
        parameters = sum(math.prod(tensor.shape) for tensor in open_model(model.path).tensors)
        if parameters > _MOST_ON_CPU:
            raise UsageError(
                f"{model.name}: {parameters / 1e9:.1f} billion parameters would be trained on the CPU: {reason}; to "
                "train there all the same, hide the GPU: CUDA_VISIBLE_DEVICES= macft train ..."
            )
