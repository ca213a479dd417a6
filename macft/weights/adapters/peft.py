"""Read and write LoRA adapters in PEFT's format, checking every setting."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (numpy reads bfloat16 only once this is imported)
import numpy as np
from safetensors import SafetensorError, safe_open

from macft import __version__
from macft.errors import MacftError, ModelError, raise_problems
from macft.files import write_json
from macft.weights.adapters import shapes
from macft.weights.adapters.experts import fuse_experts, split_experts
from macft.weights.adapters.own import OwnTensors, split_own
from macft.weights.layouts.mlx import LAYOUTS
from macft.weights.model_config import Config
from macft.weights.tensors.lazy import Array
from macft.weights.tensors.safetensors import write_state

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

State = dict[str, Array]


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter whose modules all have the same rank and scale."""

    base: str  # the base model as the user typed it
    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    use_dora: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter read from disk; `base_hash` is None for adapters of other tools.

    `own` are tensors of the model itself that were saved with it.
    """

    folder: Path
    config: AdapterConfig
    state: State
    base_hash: str | None
    own: OwnTensors = field(default_factory=OwnTensors)


@contextmanager
def naming_adapter(adapter: Adapter, base: str, kind: type[MacftError]) -> Iterator[None]:
    """Turn errors of this kind, raised while the adapter is attached, into a ModelError that names adapter and base."""
    try:
        yield
    except kind as error:
        raise ModelError(f"{adapter.folder}: made for {adapter.config.base}, on {base}: {error}") from None


def write_adapter(folder: Path, config: AdapterConfig, state: State, base_hash: str | None) -> None:
    """Write adapter_config.json and adapter_model.safetensors into an existing folder.

    The hash of the base is stored in the metadata of the weights file, since PEFT warns of unknown keys in its
    configuration.
    """
    write_state(folder / WEIGHTS_NAME, state, metadata=metadata_of("pt", base_hash))
    write_json(folder / CONFIG_NAME, peft_config(config))


def write_peft_adapter(folder: Path, adapter: Adapter, base_config: Config | None = None) -> list[str]:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them into an existing folder.

    Experts and routers become target_parameters. Returns notes for the user.
    """
    config = adapter.config
    problems: list[str] = []
    modules = shapes.split_modules(adapter.state, config.use_dora, problems)
    raise_problems(f"{adapter.folder}: PEFT cannot represent this adapter", problems)
    fused, parameters, gate_up_rank = fuse_experts(modules, base_config, config.rank)
    as_parameters = {name.rpartition(".")[0] for name in parameters}
    targets = [name for name in fused if name.removesuffix(".base_layer") not in as_parameters]
    content = peft_config(config) | {"target_modules": targets}
    notes: list[str] = []
    if parameters:
        content |= {"target_parameters": parameters, "lora_dropout": 0.0}
        if config.dropout:
            notes.append(f"lora_dropout is 0 in place of {config.dropout}: PEFT has none on experts")
    if gate_up_rank != config.rank:
        key = "experts.gate_up_proj"
        content["rank_pattern"] = {key: gate_up_rank}
        content["alpha_pattern"] = {key: config.alpha * gate_up_rank / config.rank}
        notes.append(f"gate and up of the experts are one parameter in PEFT: its rank is {gate_up_rank}")
    write_state(folder / WEIGHTS_NAME, shapes.join_modules(fused), metadata=metadata_of("pt", adapter.base_hash))
    write_json(folder / CONFIG_NAME, content)
    return notes


def metadata_of(layout: str, base_hash: str | None) -> dict[str, str]:
    """The metadata of a weights file in this layout, pt or mlx."""
    metadata = {"format": layout, "macft": __version__}
    return metadata if base_hash is None else {**metadata, "base_weights": base_hash}


def peft_config(config: AdapterConfig) -> dict[str, Any]:
    """The adapter_config.json that PEFT reads."""
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


_MERGE_THERE = "it is not supported; merge the adapter with PEFT"
_STAY_THERE = "it is not supported, and not even PEFT can merge it; use the adapter with PEFT"
_REPEATED = "this start changes the base's own weights as well; merge the adapter with PEFT, which repeats the change"
_LOST = (
    "this start changes the base's own weights as well, in a way that cannot be repeated; save the adapter with PEFT's "
    "save_pretrained(path_initial_model_for_weight_conversion=FIRST), FIRST being the adapter as it was before "
    "training, or take the changed base, if it was saved, and set init_lora_weights to true"
)
# What the settings mean here: the values that change nothing, and why others are refused. Not listed, because the
# weights file says it all: modules_to_save, bias, trainable_token_indices, ensure_weight_tying.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "lora_bias": ((False, None), f"{_MERGE_THERE}, which can where the base's layers have biases"),
    **dict.fromkeys(("use_qalora", "use_bdlora"), ((False, None), _MERGE_THERE)),
    **dict.fromkeys(("kasa_config", "monteclora_config", "velora_config"), ((None,), _MERGE_THERE)),
    **dict.fromkeys(("layer_replication", "arrow_config", "alora_invocation_tokens"), ((None,), _STAY_THERE)),
    "init_lora_weights": ((True, False, None, "gaussian", "orthogonal", "eva", "mica"), _LOST),
}
_REPEATABLE = ("pissa", "olora", "loftq")  # starts that PEFT computes again from the base alone
# Settings with which only the tensors say which modules have an adapter, or its shape.
_SHAPING = ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules", "target_parameters")


def read_adapter(folder: Path, base_config: Config | None = None, *, with_saved: bool = False) -> Adapter:
    """Read a PEFT adapter; raises ModelError naming every setting that would be computed differently.

    Modules of different ranks and scales are given the same; targets that are not plain names become the full
    names of the modules. `base_config`, the base's config.json, is needed for experts and for fan_in_fan_out.
    Tensors of the model itself are refused unless `with_saved` says that the caller handles `Adapter.own`.
    """
    raw = read_json_config(folder)
    config = _checked(folder, raw, base_config)
    if (folder / "adapter_model.bin").exists() and not (folder / WEIGHTS_NAME).exists():
        raise ModelError(
            f"{folder}: adapter_model.bin is pickled, and unpickling runs code from the file: load the adapter with "
            "PEFT in an environment you trust and save_pretrained() it again"
        )
    state, base_hash = read_tensors(folder, WEIGHTS_NAME)
    problems: list[str] = []
    state, own = split_own(state, raw, problems)
    raise_problems(f"{folder / WEIGHTS_NAME}: does not fit its {CONFIG_NAME}", problems)
    if own.names and not with_saved:
        raise ModelError(needs_merging(folder, own))
    if any(raw.get(key) for key in _SHAPING) or raw.get("layers_to_transform") == 0 or not config.target_modules:
        config, state = _shaped(folder, raw, config, state, base_config)
    return Adapter(folder, config, state, base_hash, own)


def needs_merging(folder: Path, own: OwnTensors) -> str:
    """Why an adapter with tensors of the model itself cannot be attached, and the way out."""
    shown = ", ".join(own.names[:3]) + (f" and {len(own.names) - 3} more" if len(own.names) > 3 else "")
    return (
        f"{folder}: holds more than LoRA: {shown} of the model itself (modules_to_save, bias, trainable tokens or a "
        "resized vocabulary); merge it: macft export merged BASE --adapter DIR --output NEW, and use NEW"
    )


def read_tensors(folder: Path, name: str) -> tuple[State, str | None]:
    """The tensors of a file in float32, and the hash of the base if it is there; ModelError names NaN and Inf."""
    path = folder / name
    if not path.exists():
        raise ModelError(f"{folder}: no {name}; an adapter folder has it next to {CONFIG_NAME}")
    state: State = {}
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118
                state[key] = file.get_tensor(key).astype(np.float32)
    except (SafetensorError, TypeError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}); copy the adapter again") from None
    problems = [f"{key} holds NaN or infinite numbers" for key, value in state.items() if not np.isfinite(value).all()]
    raise_problems(f"{path}: the adapter is broken; take an earlier checkpoint", problems)
    return state, metadata.get("base_weights")


def read_json_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json; ModelError if it is not a JSON object."""
    path = folder / CONFIG_NAME
    if not path.exists():
        raise ModelError(f"{folder}: no {CONFIG_NAME}; expected the folder of an adapter")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: no peft_type; expected the configuration of an adapter")
    return raw


def _checked(folder: Path, raw: dict[str, Any], base_config: Config | None) -> AdapterConfig:
    path = folder / CONFIG_NAME
    if "peft_type" not in raw:
        raise ModelError(f"{path}: no peft_type; expected the configuration of a PEFT adapter")
    problems = _refusals(raw)
    if raw["peft_type"] != "LORA":
        problems.append(f"peft_type is {raw['peft_type']}, expected LORA")
    # PEFT resets it to false on linear layers, and the known models have no others
    if raw.get("fan_in_fan_out") and (base_config is None or base_config.get("model_type") not in LAYOUTS):
        kind = "no base was named" if base_config is None else f"{base_config.get('model_type')} is not known here"
        problems.append(
            f"fan_in_fan_out is True, which matters unless all layers are linear, and {kind}; merge with PEFT"
        )
    problems += shapes.pattern_problems(raw)
    rank: Any = raw.get("r")
    alpha: Any = raw.get("lora_alpha")
    targets = raw.get("target_modules")
    if type(rank) is not int or rank < 1:
        problems.append(f"r is {rank!r}, expected a rank above 0")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        problems.append(f"lora_alpha is {alpha!r}, expected a number")
    if not targets and not raw.get("target_parameters"):
        problems.append(f"target_modules is {targets!r}, expected a list of module names")
    elif targets and not isinstance(targets, str | list):
        problems.append(f"target_modules is {targets!r}, expected module names")
    raise_problems(f"{path}: this adapter cannot be used as it is", problems)
    return AdapterConfig(
        base=str(raw.get("base_model_name_or_path") or ""),
        rank=rank,
        alpha=float(alpha),
        dropout=float(raw.get("lora_dropout") or 0.0),
        target_modules=() if isinstance(targets, str) else tuple(targets or ()),
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
    )


def _refusals(raw: Mapping[str, Any]) -> list[str]:
    """The settings of `_REFUSED` that this adapter has, and those for the weights file that are not of their kind."""
    if isinstance(start := raw.get("init_lora_weights"), str):
        raw = {**raw, "init_lora_weights": start.lower()}
    problems = [
        f"{key} is {raw[key]!r}: {_REPEATED if raw[key] in _REPEATABLE else reason}"
        for key, (harmless, reason) in _REFUSED.items()
        if key in raw and raw[key] not in harmless
    ]
    if not _is_list(raw.get("modules_to_save"), str):
        problems.append(f"modules_to_save is {raw['modules_to_save']!r}, expected a list of module names")
    tokens = raw.get("trainable_token_indices")
    if not all(_is_list(ids, int) for ids in (tokens.values() if isinstance(tokens, dict) else [tokens])):
        problems.append(f"trainable_token_indices is {tokens!r}, expected token ids, or an object of them")
    return problems


def _is_list(value: Any, kind: type) -> bool:
    return value is None or (isinstance(value, list) and all(type(item) is kind for item in value))


def _shaped(
    folder: Path, raw: dict[str, Any], config: AdapterConfig, state: State, base_config: Config | None
) -> tuple[AdapterConfig, State]:
    """The adapter with one rank and scale, its targets the full names of the modules that have tensors."""
    problems: list[str] = []
    modules = shapes.split_modules(state, config.use_dora, problems)
    problems += shapes.layer_problems(raw, modules)
    default = shapes.Shape(config.rank, config.alpha, config.use_rslora)
    keys: dict[str, str] = {}  # what PEFT matches its patterns against, where it is not the module's name
    if not problems and raw.get("target_parameters"):
        modules, keys = split_experts(modules, base_config, problems)
    shape_of = shapes.pattern_shapes(raw, default)
    own = {module: shape_of(keys.get(module, module)) for module in modules}
    if not problems:
        problems += [
            f"{module}: its tensors are of rank {rank}, the configuration says {own[module].rank}"
            for module, parts in modules.items()
            if (rank := parts[shapes.pair_of(parts)[0]].shape[0]) != own[module].rank
        ]
    if not problems and not modules:
        problems.append("holds no tensors")
    raise_problems(f"{folder / WEIGHTS_NAME}: does not fit its {CONFIG_NAME}", problems)
    modules, shape = shapes.uniform(modules, own, default)
    return replace(config, **asdict(shape), target_modules=tuple(modules)), shapes.join_modules(modules)
