"""Translate a LoRA configuration of mlx-lm into macft's keys, with notes on what differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from macft.config.names import UnsupportedKey
from macft.config.parse import ConfigEntry
from macft.config.translate import shown

# mlx-lm's own keys and defaults, without those that mean the same elsewhere: model, learning_rate, seed, report_to
DEFAULTS: dict[str, Any] = {
    "data": None,
    "fine_tune_type": "lora",
    "optimizer": "adam",
    "optimizer_config": {},
    "num_layers": 16,
    "batch_size": 4,
    "iters": 1000,
    "val_batches": 25,
    "steps_per_report": 10,
    "steps_per_eval": 200,
    "resume_adapter_file": None,
    "adapter_path": "adapters",
    "save_every": 100,
    "grad_checkpoint": False,
    "grad_accumulation_steps": 1,
    "lr_schedule": None,
    "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
    "mask_prompt": False,
    "train": True,
    "test": False,
    "test_batches": None,
    "clear_cache_threshold": 0,
    "hf_dataset": None,
}
# Its defaults where macft's differ.
_OTHER_DEFAULTS = {"learning_rate": 1e-5, "seed": 0}
DEFAULT = "mlx-lm's default"
# keys that no other program's training configuration has
_MARKS = frozenset({"iters", "lora_parameters", "steps_per_eval", "steps_per_report", "val_batches", "grad_checkpoint"})
_MARKS |= {"fine_tune_type", "mask_prompt", "save_every", "adapter_path"}
_OF_OTHERS = frozenset({"stage", "finetuning_type", "model_name_or_path", "dataset", "output_dir"})

# What the page of keys says: mlx-lm's key -> macft's, and the difference.
TABLE = {
    "model": ("model_name_or_path", ""),
    "data": (
        "dataset, eval_dataset",
        "a folder's `train.jsonl` and `valid.jsonl`; `text` rows make it stage `pt`, unpacked",
    ),
    "fine_tune_type": ("finetuning_type, use_dora", ""),
    "lora_parameters": ("lora_rank, lora_alpha, lora_dropout, lora_target", "alpha is scale x rank"),
    "num_layers": ("none", "every layer gets an adapter; theirs: only the last ones"),
    "mask_prompt": (
        "mask_history, train_on_prompt",
        "true: the last answer is trained on; false: every token, the prompt too",
    ),
    "iters": ("max_steps", "iterations are batches, steps are updates: divided by grad_accumulation_steps"),
    "batch_size": ("per_device_train_batch_size, per_device_eval_batch_size", ""),
    "grad_accumulation_steps": ("gradient_accumulation_steps", ""),
    "learning_rate": ("learning_rate", "constant unless lr_schedule says otherwise"),
    "lr_schedule": ("lr_scheduler_type, learning_rate, warmup_steps", "ours ends with the last step"),
    "optimizer": (
        "adam_beta1, adam_beta2, adam_epsilon, weight_decay",
        "moments are bias-corrected; no clipping",
    ),
    "max_seq_length": ("cutoff_len", "theirs cuts the end of a row; here user text is shortened first"),
    "grad_checkpoint": ("gradient_checkpointing", ""),
    "steps_per_report": ("logging_steps", ""),
    "steps_per_eval": ("eval_strategy, eval_steps", ""),
    "val_batches": ("none", "the whole validation set is evaluated"),
    "save_every": ("save_strategy, save_steps", ""),
    "adapter_path": ("output_dir", "the adapter is in PEFT's layout; `macft convert adapter --to mlx` makes it theirs"),
    "resume_adapter_file": ("adapter_name_or_path", "the folder of the file"),
}


@dataclass
class MlxLmRun:
    """The run in macft's keys, the differences, problems, and keys without effect."""

    entries: dict[str, ConfigEntry] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unused: dict[str, UnsupportedKey] = field(default_factory=dict)


def is_mlx_lm(entries: Mapping[str, ConfigEntry]) -> bool:
    """Whether these keys are a configuration of mlx-lm."""
    return not _MARKS.isdisjoint(entries) and _OF_OTHERS.isdisjoint(entries)


def translate(entries: Mapping[str, ConfigEntry]) -> MlxLmRun:
    """Translate mlx-lm's keys; those that it does not have, or that mean the same, are left as they are."""
    translator = _Translator(entries)
    translator.data()
    translator.method()
    translator.length()
    translator.course()
    translator.optimizer()
    translator.output()
    translator.unused()
    own = {key: entry for key, entry in entries.items() if key not in DEFAULTS and entry.value is not None}
    translator.result.entries |= own
    return translator.result


class _Translator:
    """Reads mlx-lm's keys one group after the other; each value keeps the place where it was written."""

    def __init__(self, entries: Mapping[str, ConfigEntry]):
        self.written = entries
        self.result = MlxLmRun()
        self.note = self.result.notes.append
        accumulation = self.count("grad_accumulation_steps")
        self.accumulation = accumulation if accumulation > 0 else 1

    def value(self, key: str) -> Any:
        entry = self.written.get(key)
        if entry is None or (entry.value is None and key not in ("data", "lr_schedule", "resume_adapter_file")):
            return DEFAULTS[key] if key in DEFAULTS else _OTHER_DEFAULTS.get(key)
        return entry.value

    def count(self, key: str) -> int:
        """The value as a whole number; anything else is a problem, and the default is returned."""
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            self.problem(key, "a whole number")
            return int(DEFAULTS[key])
        return int(value)

    def set(self, name: str, value: Any, key: str, how: str | None = None) -> None:
        """Set macft's key `name`, which comes from mlx-lm's `key`."""
        entry = self.written.get(key)
        origin = entry.origin if entry is not None and entry.value is not None else DEFAULT
        self.result.entries[name] = ConfigEntry(value, origin, how or (key if key != name else None))

    def problem(self, key: str, expected: str) -> None:
        entry = self.written[key]
        problem = f"{key} ({entry.origin}): found {shown(entry.value)}, expected {expected}"
        if problem not in self.result.problems:
            self.result.problems.append(problem)

    def data(self) -> None:
        if self.value("hf_dataset"):
            self.problem("hf_dataset", "data, a folder of JSONL files or the name of a data set")
        source = self.value("data")
        if source is None:
            return
        if not isinstance(source, str):
            self.problem("data", "a folder with train.jsonl, or the name of a data set")
            return
        folder = Path(source).expanduser()
        if not folder.is_dir():
            self.set("dataset", source, "data")
            self.mask(is_text=False)
            return
        if not (folder / "train.jsonl").is_file():
            self.problem("data", "a folder that holds train.jsonl")
        self.set("dataset", str(folder / "train.jsonl"), "data")
        if (folder / "valid.jsonl").is_file() and (folder / "valid.jsonl").stat().st_size > 0:
            self.set("eval_dataset", str(folder / "valid.jsonl"), "data")
            self.set("eval_strategy", "steps", "steps_per_eval")
            self.set("eval_steps", self.steps("steps_per_eval"), "steps_per_eval")
        is_text = _holds_texts(folder / "train.jsonl")
        if is_text:
            self.set("stage", "pt", "data", "data, whose rows are texts")
            self.set("packing", False, "data", "data, whose rows are texts")
        self.mask(is_text=is_text)

    def mask(self, *, is_text: bool) -> None:
        masks = self.value("mask_prompt")
        if not isinstance(masks, bool):
            self.problem("mask_prompt", "true or false")
        elif is_text and masks:
            self.problem("mask_prompt", "false: rows of text have no prompt")
        elif masks:
            self.set("mask_history", True, "mask_prompt")
        elif not is_text:
            self.set("train_on_prompt", True, "mask_prompt")
            self.note("mask_prompt is false: every token is trained on, the prompt and the template too")

    def method(self) -> None:
        kind = self.value("fine_tune_type")
        if kind not in ("lora", "dora", "full"):
            self.problem("fine_tune_type", "lora, dora or full")
            return
        self.set("finetuning_type", "full" if kind == "full" else "lora", "fine_tune_type")
        if kind == "dora":
            self.set("use_dora", True, "fine_tune_type")
        if kind != "full":
            self.lora()
        layers = self.count("num_layers")
        if layers > 0:
            what = "all layers are trained" if kind == "full" else "the adapter is on all layers"
            said = "num_layers" if "num_layers" in self.written else f"num_layers, by {DEFAULT},"
            self.result.warnings.append(f"{said} is {layers}: theirs trains the last {layers} layers; here {what}")
        resumed = self.value("resume_adapter_file")
        if resumed is not None:
            path = Path(str(resumed))
            if path.name != "adapters.safetensors":
                self.problem("resume_adapter_file", "a file adapters.safetensors beside its adapter_config.json")
            else:
                self.set("adapter_name_or_path", str(path.parent), "resume_adapter_file")

    def lora(self) -> None:
        parameters = self.value("lora_parameters")
        known = {"rank", "scale", "dropout", "keys"}
        if not isinstance(parameters, dict) or not set(parameters) <= known or not {"rank", "scale"} <= set(parameters):
            self.problem("lora_parameters", "rank and scale, and perhaps dropout and keys")
            return
        rank, scale = parameters["rank"], parameters["scale"]
        if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in (rank, scale)):
            self.problem("lora_parameters", "numbers for rank and scale")
            return
        self.set("lora_rank", rank, "lora_parameters", "lora_parameters.rank")
        self.set("lora_alpha", float(scale * rank), "lora_parameters", "lora_parameters.scale x rank")
        self.note(f"lora_alpha is {scale * rank:g}: scale {scale:g} x rank {rank:g}")
        self.set("lora_dropout", parameters.get("dropout", 0.0), "lora_parameters", "lora_parameters.dropout")
        if parameters.get("keys"):
            self.set("lora_target", parameters["keys"], "lora_parameters", "lora_parameters.keys")

    def steps(self, key: str) -> int:
        """Batches as optimizer steps, at least 1."""
        return max(1, self.count(key) // self.accumulation)

    def length(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            self.set(name, self.count("batch_size"), "batch_size")
        self.set("gradient_accumulation_steps", self.count("grad_accumulation_steps"), "grad_accumulation_steps")
        self.set("max_steps", self.steps("iters"), "iters")
        if self.accumulation > 1:
            self.note(
                f"iters are batches: {self.count('iters')} of them are {self.steps('iters')} optimizer steps, and so "
                "with steps_per_report, steps_per_eval and save_every"
            )
        self.set("gradient_checkpointing", self.value("grad_checkpoint"), "grad_checkpoint")
        self.note("pad tokens are not trained on; mlx-lm's loss counts one per row")
        self.note("rows longer than max_seq_length lose user text first; mlx-lm cuts their end")

    def course(self) -> None:
        for key in _OTHER_DEFAULTS:
            if key not in self.written or self.written[key].value is None:
                self.set(key, self.value(key), key)
        schedule = self.value("lr_schedule")
        if schedule is None:
            self.set("lr_scheduler_type", "constant", "lr_schedule")
            return
        course = _course(schedule)
        if course is None:
            self.problem("lr_schedule", "cosine_decay or linear_schedule with its numbers, and a rate that falls")
            return
        start, falling_steps, kind, options = course
        self.set("learning_rate", start, "lr_schedule", "lr_schedule.arguments")
        self.set("lr_scheduler_type", kind, "lr_schedule", "lr_schedule.name")
        if options:
            self.set("lr_scheduler_kwargs", options, "lr_schedule", "lr_schedule.arguments")
        warmup = int(schedule.get("warmup") or 0)
        if warmup:
            self.set("warmup_steps", warmup, "lr_schedule", "lr_schedule.warmup")
        if schedule.get("warmup_init"):
            self.note(f"the warmup starts at 0, not at lr_schedule.warmup_init {schedule['warmup_init']:g}")
        total = self.steps("iters")
        end = int(falling_steps) + warmup
        if end != total:
            self.note(f"the learning rate falls until the last step, {total}; by lr_schedule until step {end}")

    def optimizer(self) -> None:
        name = self.value("optimizer")
        if name not in ("adam", "adamw"):
            self.problem("optimizer", "adam or adamw")
            return
        all_options = self.value("optimizer_config")
        options = (all_options.get(name) or {}) if isinstance(all_options, dict) else None
        if not isinstance(options, dict) or not set(options) <= {"betas", "eps", "weight_decay", "bias_correction"}:
            self.problem("optimizer_config", f"{name}: with betas, eps, weight_decay or bias_correction")
            return
        how = f"optimizer_config.{name}"
        for key, number in zip(("adam_beta1", "adam_beta2"), options.get("betas") or (), strict=False):
            self.set(key, number, "optimizer_config", how)
        if "eps" in options:
            self.set("adam_epsilon", options["eps"], "optimizer_config", how)
        decay = options.get("weight_decay", 0.01) if name == "adamw" else 0.0
        self.set("weight_decay", decay, "optimizer_config" if "weight_decay" in options else "optimizer", how)
        self.set("max_grad_norm", 0.0, "optimizer", "optimizer, which does not clip")
        if not options.get("bias_correction"):
            self.note(f"{name} corrects its moments for their start at 0 (bias_correction): its first steps differ")

    def output(self) -> None:
        self.set("output_dir", self.value("adapter_path"), "adapter_path")
        self.note("the adapter is written in PEFT's layout; macft convert adapter --to mlx makes it mlx-lm's")
        self.set("logging_steps", self.steps("steps_per_report"), "steps_per_report")
        self.set("save_strategy", "steps", "save_every")
        self.set("save_steps", self.steps("save_every"), "save_every")

    def unused(self) -> None:
        if self.value("train") is not True:
            self.problem("train", "true: macft train trains")
        unused = {
            "val_batches": "the whole validation set is evaluated",
            "test": "test.jsonl is not evaluated",
            "test_batches": "test.jsonl is not evaluated",
            "clear_cache_threshold": "it changes speed or memory, not results",
        }
        for key, reason in unused.items():
            entry = self.written.get(key)
            nothing = (None, False, 0, -1) if key == "val_batches" else (None, False, 0)
            if entry is not None and entry.value not in nothing:
                self.result.unused[key] = UnsupportedKey(False, reason)


def _course(schedule: Any) -> tuple[float, float, str, dict[str, float]] | None:
    """(peak rate, steps, lr_scheduler_type, its options) of `lr_schedule`; None if macft has no schedule like it."""
    if not isinstance(schedule, dict):
        return None
    name, numbers = schedule.get("name"), schedule.get("arguments")
    if not isinstance(numbers, list) or not all(isinstance(number, int | float) for number in numbers):
        return None
    if name == "cosine_decay" and len(numbers) in (2, 3):
        start, steps, end = (*numbers, 0.0)[:3]
        kind, options = ("cosine_with_min_lr", {"min_lr": float(end)}) if end > 0 else ("cosine", {})
    elif name == "linear_schedule" and len(numbers) == 3:
        start, end, steps = numbers
        kind, options = ("polynomial", {"lr_end": float(end), "power": 1.0}) if end > 0 else ("linear", {})
    else:
        return None
    return (start, steps, kind, options) if end < start else None


def _holds_texts(path: Path) -> bool:
    """Whether the first row is a text, as mlx-lm decides it; problems of the file are reported later."""
    try:
        with path.open(encoding="utf-8") as file:
            row = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    is_chat = isinstance(row, dict) and ("messages" in row or {"prompt", "completion"} <= set(row))
    return isinstance(row, dict) and "text" in row and not is_chat
