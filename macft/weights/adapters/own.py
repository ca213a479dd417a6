"""Tell the tensors of LoRA from tensors of the model itself, which PEFT saves in the same file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from macft.weights.adapters.shapes import PREFIX, suffix_of
from macft.weights.tensors.lazy import Array

_ROWS = "token_adapter.trainable_tokens_delta"
# a module that PEFT wraps is in the file once more under the wrapper's names when its vocabulary was resized
_AGAIN = re.compile(r"\.(modules_to_save|original_module)\.(?=[^.]+$)")
_WRAPPERS = re.compile(r"\.(token_adapter\.)?base_layer\.(?=[^.]+$)")


@dataclass(frozen=True)
class Rows:
    """Trained rows of an embedding or a head: the token id of each, and its values [rows, width]."""

    ids: tuple[int, ...]
    values: Array


@dataclass(frozen=True)
class OwnTensors:
    """Tensors of the model, under the model's names, that take the place of the base's.

    `apart` were trained in a copy of their own (PEFT's modules_to_save). `in_place` are the base's own as they stood
    after training: where head and embedding are one matrix, they are both.
    """

    apart: dict[str, Array] = field(default_factory=dict)
    in_place: dict[str, Array] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)

    @property
    def whole(self) -> dict[str, Array]:
        """The tensors that are replaced as a whole."""
        return {**self.in_place, **self.apart}

    @property
    def names(self) -> list[str]:
        """All tensors that are replaced, in part or as a whole."""
        return [*self.whole, *(name for name in self.rows if name not in self.whole)]


def split_own(
    state: Mapping[str, Array], raw: Mapping[str, Any], problems: list[str]
) -> tuple[dict[str, Array], OwnTensors]:
    """(LoRA tensors in PEFT's names, the model's own) of a file; what contradicts its configuration is a problem.

    PEFT takes a module whose name ends in one of modules_to_save, with all that is in it.
    """
    trained_whole = tuple(raw.get("modules_to_save") or ())
    lora: dict[str, Array] = {}
    own = OwnTensors()
    for name, array in state.items():
        path = name.removeprefix(PREFIX)
        if _AGAIN.search(name) and _AGAIN.sub(".", name) in state:
            continue
        if path.endswith(f".{_ROWS}"):
            module = path.removesuffix(f".{_ROWS}")
            own.rows[f"{module}.weight"] = Rows(_token_ids(raw, module, array, problems), array)
        elif ".token_adapter." not in path and suffix_of(name) is not None:
            lora[name] = array
        elif _is_in(path, trained_whole):
            # with ensure_weight_tying the copy stands for the head and the embedding
            (own.in_place if raw.get("ensure_weight_tying") else own.apart)[path] = array
        elif name.startswith(PREFIX) and path.endswith((".weight", ".bias")) and ".lora_" not in path:
            own.in_place[_WRAPPERS.sub(".", path)] = array
        else:
            lora[name] = array
    if trained_whole and not any(_is_in(name, trained_whole) for name in own.whole):
        problems.append(f"modules_to_save is {list(trained_whole)}, of which the file holds no tensor")
    if raw.get("trainable_token_indices") and not own.rows:
        problems.append(f"trainable_token_indices is set, but the file holds no {_ROWS}")
    return lora, own


def _is_in(path: str, modules: tuple[str, ...]) -> bool:
    parents = path.split(".")[:-1]
    return any(".".join(parents[: count + 1]).endswith(modules) for count in range(len(parents)))


def _token_ids(raw: Mapping[str, Any], module: str, values: Array, problems: list[str]) -> tuple[int, ...]:
    """The ids of a module's trained rows: a list is for the embedding, and the head of a tied one has the same."""
    given = raw.get("trainable_token_indices") or ()
    if isinstance(given, dict):
        ends = [key for key in given if module.endswith(key)] or [key for key in given if "embed" in key]
        given = given[ends[0]] if ends else ()
    if len(given) != len(values):
        problems.append(f"{module}: {len(values)} rows were trained, trainable_token_indices names {len(given)}")
    return tuple(given)
