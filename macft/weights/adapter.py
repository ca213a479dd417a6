"""LoRA adapters on disk, in PEFT's layout: read with every setting checked, written whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (numpy reads bfloat16 only once this is imported)
import numpy as np
from safetensors import SafetensorError, safe_open

from macft import __version__
from macft.errors import MacftError, ModelError, join_faults
from macft.files import write_json
from macft.weights.stream import write_state

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

State = dict[str, np.ndarray]


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says of an adapter."""

    base: str  # the base model as the user typed it
    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    use_dora: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter read from disk; `base_hash` is None in adapters of other tools."""

    folder: Path
    config: AdapterConfig
    state: State
    base_hash: str | None


@contextmanager
def fitting(adapter: Adapter, base: str, kind: type[MacftError]) -> Iterator[None]:
    """Errors of this kind, raised where the adapter meets the base, name both as ModelError."""
    try:
        yield
    except kind as error:
        raise ModelError(f"{adapter.folder}: made for {adapter.config.base}, on {base}: {error}") from None


def write_adapter(folder: Path, config: AdapterConfig, state: State, base_hash: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors into an existing folder.

    The hash of the base goes into the metadata of the weights file: PEFT warns of keys it does not
    know in its configuration.
    """
    metadata = {"format": "pt", "macft": __version__, "base_weights": base_hash}
    write_state(folder / WEIGHTS_NAME, state, metadata=metadata)
    write_json(folder / CONFIG_NAME, _peft_config(config))


def _peft_config(config: AdapterConfig) -> dict[str, Any]:
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


# Settings that change what an adapter computes, with the values that change nothing.
_UNSUPPORTED = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "layers_to_transform": (None,),
    "exclude_modules": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT adapter; raises ModelError naming everything in it that would be computed otherwise."""
    config = _read_config(folder)
    path = folder / WEIGHTS_NAME
    if not path.exists():
        raise ModelError(f"{folder}: no {WEIGHTS_NAME}; an adapter folder has it beside {CONFIG_NAME}")
    state: State = {}
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118
                state[name] = file.get_tensor(name).astype(np.float32)
    except (SafetensorError, TypeError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}); copy the adapter again") from None
    return Adapter(folder, config, state, metadata.get("base_weights"))


def _read_config(folder: Path) -> AdapterConfig:
    path = folder / CONFIG_NAME
    if not path.exists():
        raise ModelError(f"{folder}: no {CONFIG_NAME}; wanted the folder of a PEFT adapter")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict) or "peft_type" not in raw:
        raise ModelError(f"{path}: no peft_type; wanted the configuration of a PEFT adapter")
    faults = []
    if raw["peft_type"] != "LORA":
        faults.append(f"peft_type is {raw['peft_type']}, wanted LORA")
    faults += [
        f"{key} is {raw[key]!r}, which is not supported; merge the adapter with PEFT"
        for key, harmless in _UNSUPPORTED.items()
        if key in raw and raw[key] not in harmless
    ]
    rank: Any = raw.get("r")
    alpha: Any = raw.get("lora_alpha")
    targets: Any = raw.get("target_modules")
    if not isinstance(rank, int) or rank < 1:
        faults.append(f"r is {rank!r}, wanted a rank above 0")
    if not isinstance(alpha, int | float):
        faults.append(f"lora_alpha is {alpha!r}, wanted a number")
    if not isinstance(targets, list) or not targets:
        faults.append(f"target_modules is {targets!r}, wanted a list of module names")
    if faults:
        raise ModelError(join_faults(f"{path}: this adapter cannot be used as it is", faults))
    return AdapterConfig(
        base=str(raw.get("base_model_name_or_path") or ""),
        rank=rank,
        alpha=float(alpha),
        dropout=float(raw.get("lora_dropout") or 0.0),
        target_modules=tuple(targets),
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
    )
