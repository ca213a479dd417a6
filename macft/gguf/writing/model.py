"""What a GGUF file is made of before any number of it is read: fields, and tensors that are read when written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from macft.weights.tensors.lazy import LazyTensor

# int: UINT32; float: FLOAT32; a numpy scalar: its own type; an array: ARRAY of its dtype; a list: ARRAY of STRING.
Field = str | bool | int | float | np.generic | np.ndarray[Any, Any] | list[str]


@dataclass(frozen=True)
class GgufModel:
    """`fields` in file order; `tensors` by their GGUF names, shapes outermost axis first, all of them floats."""

    architecture: str
    fields: dict[str, Field]
    tensors: list[LazyTensor]
