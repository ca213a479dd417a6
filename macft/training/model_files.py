"""What a run leaves for others to load: the adapter or the full model, with tokenizer and template."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from macft.backends.base import LoraSpec, State
from macft.data.template import ChatTemplate
from macft.data.tokenizer import Tokenizer
from macft.files import write_json, write_text
from macft.weights.adapter import WEIGHTS_NAME, AdapterConfig, read_adapter, write_adapter
from macft.weights.locate import ModelFolder, weights_hash
from macft.weights.model_config import normalise_config, read_config

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FULL_WEIGHTS = "model.safetensors"
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class ModelFiles:
    """Everything but the trained numbers that an adapter folder, or a full model's folder, holds."""

    base: ModelFolder
    lora: LoraSpec | None  # None: full fine-tuning
    target_modules: tuple[str, ...]
    tokenizer: Tokenizer
    template: ChatTemplate

    def write(self, folder: Path, state: State, *, exact: bool = False) -> None:
        """Write the files; a full model takes the base's precision, or float32 if `exact`."""
        self.tokenizer.save(folder)
        write_text(folder / TEMPLATE, self.template.source)
        if self.lora is None:
            self._write_full(folder, state, exact)
            return
        config = AdapterConfig(
            base=self.base.name,
            rank=self.lora.rank,
            alpha=self.lora.alpha,
            dropout=self.lora.dropout,
            target_modules=self.target_modules,
            use_rslora=self.lora.use_rslora,
            use_dora=self.lora.use_dora,
        )
        write_adapter(folder, config, state, weights_hash(self.base.path))

    def _write_full(self, folder: Path, state: State, exact: bool) -> None:
        config = normalise_config(read_config(self.base.path))
        name = "float32" if exact else str(config.get("dtype") or "float32")
        dtype = _DTYPES.get(name, np.float32)
        config["dtype"] = config["torch_dtype"] = np.dtype(dtype).name
        for key in ("quantization", "quantization_config"):
            config.pop(key, None)
        temporary = folder / f".{FULL_WEIGHTS}.tmp"
        save_file({key: state[key].astype(dtype) for key in sorted(state)}, temporary, metadata={"format": "pt"})
        temporary.replace(folder / FULL_WEIGHTS)
        write_json(folder / "config.json", config)
        generation = self.base.path / "generation_config.json"
        if generation.exists():
            shutil.copyfile(generation, folder / generation.name)

    def read_state(self, folder: Path) -> State:
        """The trained parameters that `write` put there."""
        if self.lora is not None:
            return read_adapter(folder).state
        return {name: value.astype(np.float32) for name, value in load_file(folder / FULL_WEIGHTS).items()}


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
