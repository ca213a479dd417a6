"""Write and read the loadable files of a run: the adapter or the full model, with tokenizer and template."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from macft.backends.adapters import spec_of_adapter
from macft.backends.base import LoraSpec
from macft.data.templates.chat_template import ChatTemplate
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import MacftError, UsageError
from macft.files import write_bytes, write_json, write_text
from macft.weights.adapters.peft import WEIGHTS_NAME, Adapter, AdapterConfig, State, read_adapter, write_adapter
from macft.weights.adapters.stack import stack_adapters, unstack_adapter
from macft.weights.folder import ModelFolder, weights_hash
from macft.weights.model_config import normalize_config, read_config
from macft.weights.tensors.safetensors import write_state
from macft.weights.writer import repeat_template

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FULL_WEIGHTS = "model.safetensors"
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class ModelFiles:
    """What the folder of an adapter, or of a full model, holds besides the trained numbers."""

    base: ModelFolder
    lora: LoraSpec | None  # None: full fine-tuning
    target_modules: tuple[str, ...]
    merged_adapter: Adapter | None  # it became part of the base: what is written holds both
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: the model has none

    def write(self, folder: Path, state: State, *, exact: bool = False) -> None:
        """Write the files; a full model takes the base's precision, or float32 if `exact`.

        Raises MacftError, before anything is written, when the numbers are not finite.
        """
        if broken := [name for name, value in state.items() if not np.isfinite(value).all()]:
            raise MacftError(
                f"{broken[0]}: not finite after the last step, nor are {len(broken) - 1} other parameters; training "
                "has diverged and they are not written: lower learning_rate, or compute in float32 (bf16=false)"
            )
        self.tokenizer.save(folder)
        if self.template is not None:
            write_text(folder / TEMPLATE, self.template.source)
        if self.lora is None:
            self._write_full(folder, state, exact)
            return
        if self.merged_adapter is not None:
            merged = spec_of_adapter(self.merged_adapter)
            state = stack_adapters(self.merged_adapter.state, merged.rank, merged.scale, state, self.lora.scale)
        write_adapter(folder, self._config(self.lora), state, weights_hash(self.base.path))

    def _config(self, lora: LoraSpec) -> AdapterConfig:
        """The content of adapter_config.json."""
        config = AdapterConfig(
            base=self.base.name,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            target_modules=self.target_modules,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
        )
        if self.merged_adapter is None:
            return config
        rank = self.merged_adapter.config.rank + lora.rank
        targets = sorted({*self.target_modules, *self.merged_adapter.config.target_modules})
        return replace(config, rank=rank, alpha=lora.scale * rank, target_modules=tuple(targets), use_rslora=False)

    def _write_full(self, folder: Path, state: State, exact: bool) -> None:
        config = normalize_config(read_config(self.base.path))
        name = "float32" if exact else str(config.get("dtype") or "float32")
        dtype = _DTYPES.get(name, np.float32)
        config["dtype"] = config["torch_dtype"] = np.dtype(dtype).name
        for key in ("quantization", "quantization_config"):
            config.pop(key, None)
        write_state(folder / FULL_WEIGHTS, state, dtype=dtype)
        write_json(folder / "config.json", config)
        repeat_template(folder)
        generation = self.base.path / "generation_config.json"
        if generation.exists():
            write_bytes(folder / generation.name, generation.read_bytes())

    def read_state(self, folder: Path) -> State:
        """Read the trained parameters that `write` put there; raises UsageError if another kind of run wrote them."""
        if self.lora is not None and (folder / WEIGHTS_NAME).exists():
            adapter = read_adapter(folder)
            self._check_shape(self._config(self.lora), adapter.config, folder)
            if self.merged_adapter is not None:
                return unstack_adapter(adapter.state, self.merged_adapter.config.rank, self.target_modules)
            return adapter.state
        if self.lora is not None or not (folder / FULL_WEIGHTS).exists():
            found, expected = ("full", "lora") if self.lora is not None else ("lora", "full")
            raise UsageError(f"{folder}: written with finetuning_type {found}, this run has {expected}; set it back")
        return {name: value.astype(np.float32) for name, value in load_file(folder / FULL_WEIGHTS).items()}

    def _check_shape(self, expected: AdapterConfig, found: AdapterConfig, folder: Path) -> None:
        old = {**shape_keys(found), "lora_target": sorted(found.target_modules)}
        new = {**shape_keys(expected), "lora_target": sorted(expected.target_modules)}
        problems = [f"{key} {old[key]}, this run has {new[key]}" for key in old if old[key] != new[key]]
        if problems:
            raise UsageError(f"{folder}: written with {'; '.join(problems)}; set it back")


def shape_keys(config: AdapterConfig) -> dict[str, object]:
    """The shape of an adapter, without its targets, under the keys of the settings."""
    return {
        "lora_rank": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }


RUN_FILES = (
    "config.yaml",
    "trainer_log.jsonl",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
    "training_loss.png",
    "adapter_config.json",
    WEIGHTS_NAME,
    FULL_WEIGHTS,
)
