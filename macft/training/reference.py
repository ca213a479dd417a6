"""Compute the reference's log-probabilities of every row before the first step, and cache them for later runs.

The reference is the policy itself at step 0, or another model that the settings name. In both cases only one model
is in memory at a time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from macft.backends import load_model
from macft.backends.adapters import spec_of_adapter
from macft.backends.base import Model, ModelInfo, ModelSpec, Scores
from macft.config.settings import Settings
from macft.data.batches import in_order
from macft.data.tokenization.table import Feedback, Pairs, TokenizedFeedback, TokenizedPair
from macft.errors import ConfigError, ModelError
from macft.files import cache_dir
from macft.objectives.batch import NumpyBatch
from macft.objectives.kto import answer_scores
from macft.objectives.ops import NumpyOps
from macft.objectives.preference import answer_positions, reference_columns
from macft.progress import tracked
from macft.text import plural
from macft.training.evaluate import will_evaluate
from macft.training.prepare import NamedReference, Prepared, model_spec
from macft.weights.adapters.peft import Adapter, State, naming_adapter
from macft.weights.folder import ModelFolder, weights_hash
from macft.weights.tensors.safetensors import write_state

logger = logging.getLogger("macft")

RowsT = TypeVar("RowsT", Pairs, Feedback)

# Part of every key: raise it when the numbers or their layout change.
_FORMAT = 1


def policy_references(settings: Settings, prepared: Prepared, model: Model) -> Prepared:
    """The rows with the policy's own log-probabilities of them, before its first step."""
    # merged and fully trained models round in other places: in 16 bits they give different numbers
    form = {"full": settings.finetuning_type == "full", "merged": _name(prepared.merged_adapter)}
    identity = _identity(settings, model.info, prepared.base, form | {"adapter": _name(prepared.start)})
    return _fill(settings, prepared, model, identity)


def named_references(settings: Settings, prepared: Prepared, reference: NamedReference) -> Prepared:
    """The rows with another model's log-probabilities of them; that model is loaded, asked and freed."""
    base, adapter = reference.base, reference.adapter
    lora = spec_of_adapter(adapter) if adapter is not None else None
    spec = replace(model_spec(settings, prepared), folder=base.path, lora=lora, merged_adapter=None, full=False)
    model = _load(settings, prepared, spec, reference)
    form = {"full": False, "merged": None, "adapter": _name(adapter)}
    filled = _fill(settings, prepared, model, _identity(settings, model.info, base, form))
    del model
    gc.collect()
    return filled


def _load(settings: Settings, prepared: Prepared, spec: ModelSpec, reference: NamedReference) -> Model:
    adapter, name = reference.adapter, reference.base.name
    if adapter is None:
        return load_model(settings.backend, spec, None, prepared.group)
    with naming_adapter(adapter, name, ConfigError):
        model = load_model(settings.backend, spec, None, prepared.group)
    with naming_adapter(adapter, name, ModelError):
        model.set_trained_state(adapter.state)
    return model


def _identity(settings: Settings, info: ModelInfo, base: ModelFolder, form: dict[str, object]) -> str:
    config = hashlib.sha256((base.path / "config.json").read_bytes()).hexdigest()
    parts = {
        "device": f"{settings.backend} {info.device} {info.precision}",
        "quantization_bit": settings.quantization_bit,
        "base": [weights_hash(base.path), config],
        **form,
    }
    return json.dumps(parts, sort_keys=True)


def _name(adapter: Adapter | None) -> object:
    """The identity of an adapter, as JSON."""
    return [asdict(spec_of_adapter(adapter)), _hash_state(adapter.state)] if adapter is not None else None


def _hash_state(state: State) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.shape} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Columns(Generic[RowsT]):
    """The `count` numbers that the reference computes for each row of one kind; the first `needed` must be finite."""

    noun: str
    count: int
    needed: int
    options: str  # what the numbers depend on besides the rows
    parts: Callable[[Any], tuple[int, np.ndarray, np.ndarray]]  # of one row: its prompt's length, both sides' tokens
    score: Callable[[Scores, NumpyBatch], np.ndarray]  # float64 [rows of the batch, count]


def _pair_columns(settings: Settings) -> _Columns[Pairs]:
    """Log-probabilities of chosen and rejected, log perplexity of the prompt (nan: not needed)."""
    asks_prompts = settings.asks_prompts

    def parts(pair: TokenizedPair) -> tuple[int, np.ndarray, np.ndarray]:
        return pair.prompt_length, pair.chosen.tokens, pair.rejected.tokens

    def score(model: Scores, batch: NumpyBatch) -> np.ndarray:
        logps = model.logps(batch, answer_positions(batch, with_prompt=asks_prompts))
        columns = np.stack(reference_columns(logps, batch, settings.ld_alpha), axis=1)
        if not asks_prompts:
            columns[:, 2] = math.nan
        return columns

    return _Columns("pair", 3, 3 if asks_prompts else 2, f"{asks_prompts} {settings.ld_alpha}", parts, score)


def _feedback_columns() -> _Columns[Feedback]:
    """Log-probabilities of the answer, and of the answer to another prompt."""

    def parts(row: TokenizedFeedback) -> tuple[int, np.ndarray, np.ndarray]:
        return int(row.row.loss_mask.argmax()), row.row.tokens, row.mismatched.tokens

    def score(model: Scores, batch: NumpyBatch) -> np.ndarray:
        scores, _ = answer_scores(NumpyOps(), model.logps(batch, batch.loss_mask[:, 1:]), batch)
        return np.stack(np.split(scores, 2), axis=1)

    return _Columns("rated answer", 2, 2, "kto", parts, score)


def _fill(settings: Settings, prepared: Prepared, model: Scores, identity: str) -> Prepared:
    """The rows with their references, as far as a step or an evaluation will need them.

    `identity` names the model and everything else that its numbers depend on.
    """
    train, valid = prepared.train, prepared.valid
    asked: _Columns[Any] = _feedback_columns() if settings.stage == "kto" else _pair_columns(settings)
    size = settings.per_device_train_batch_size
    if isinstance(train, Pairs | Feedback):
        visited = prepared.plan.visited
        columns = np.full((len(train), asked.count), math.nan)
        columns[visited] = _scored(asked, train.take(visited), model, identity, size, "training")
        train = replace(train, references=columns)
    if isinstance(valid, Pairs | Feedback) and will_evaluate(settings, prepared.plan):
        valid = replace(valid, references=_scored(asked, valid, model, identity, size, "evaluation"))
    return replace(prepared, train=train, valid=valid)


def _scored(asked: _Columns[RowsT], rows: RowsT, model: Scores, identity: str, size: int, what: str) -> np.ndarray:
    """float64 [rows, count]: the numbers of each row, from the cache if they are there."""
    path = cache_dir() / "reference" / f"{_key(asked, rows, identity)}.safetensors"
    columns = _read(path, (len(rows), asked.count), asked.needed)
    if columns is not None:
        logger.info("reference: %s, already computed (%s)", plural(len(rows), f"{what} {asked.noun}"), path)
    else:
        columns = _compute(asked, rows, model, size, what)
        _keep(path, columns)
    return columns


def _key(asked: _Columns[RowsT], rows: RowsT, identity: str) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {asked.options} {identity} {len(rows)}".encode())
    for row in rows:
        prompt, first, second = asked.parts(row)
        digest.update(f"{prompt} {len(first)} {len(second)} ".encode() + first.tobytes() + second.tobytes())
    return digest.hexdigest()[:32]


def _read(path: Path, shape: tuple[int, int], needed: int) -> np.ndarray | None:
    """float64 `shape`; None without an intact file, so that a doubtful cache is computed again."""
    try:
        columns = load_file(path)["columns"]
    except (OSError, SafetensorError, KeyError):
        return None
    is_sound = columns.shape == shape and columns.dtype == np.float64
    return columns if is_sound and np.isfinite(columns[:, :needed]).all() else None


def _keep(path: Path, columns: np.ndarray) -> None:
    """Write the cache; if that fails, this run continues and the next one computes again."""
    try:
        write_state(path, {"columns": columns}, dtype=np.float64)
    except OSError as error:
        logger.warning("reference: not cached for later runs: %s: %s", path, error.strerror)


def _compute(asked: _Columns[RowsT], rows: RowsT, model: Scores, size: int, what: str) -> np.ndarray:
    """float64 [rows, count]; raises ModelError for log-probabilities that are not finite."""
    columns = np.full((len(rows), asked.count), math.nan)
    start = time.perf_counter()
    for indices, batch in tracked(in_order(rows, size), math.ceil(len(rows) / size), f"reference, {what}"):
        columns[indices] = asked.score(model, batch)
    logger.info("reference: %s in %.1f s", plural(len(rows), f"{what} {asked.noun}"), time.perf_counter() - start)
    if not np.isfinite(columns[:, :2]).all():
        raise ModelError("reference: log-probabilities that are not finite; compute in float32 (bf16=false)")
    return columns
