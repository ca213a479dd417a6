"""What the reference says of every pair: computed once before the first step, kept on disk, read by later runs.

The reference is the policy itself at step 0, or another model that the settings name. Either way no two models
are in memory at the same time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from macft.backends import load_backend
from macft.backends.adapters import spec_of_adapter
from macft.backends.base import Backend, LoadedModel, ModelSpec, State
from macft.config.settings import Settings
from macft.data.batches import Plan, in_order
from macft.data.tokenization.table import Pairs, TokenizedPair
from macft.errors import ConfigError, ModelError
from macft.files import cache_dir
from macft.objectives.preference import answer_positions, reference_columns
from macft.progress import tracked
from macft.text import plural
from macft.training.evaluate import will_evaluate
from macft.training.prepare import NamedReference, Prepared, model_spec
from macft.weights.adapters.peft import Adapter, naming_adapter
from macft.weights.folder import ModelFolder, weights_hash
from macft.weights.tensors.safetensors import write_state

logger = logging.getLogger("macft")

# Part of every key: raise it when the numbers or their layout change.
_FORMAT = 1


@dataclass(frozen=True)
class _Scorer:
    """A loaded model, and a text that names it and everything else that its numbers depend on."""

    backend: Backend
    identity: str


def policy_references(settings: Settings, prepared: Prepared, backend: Backend, loaded: LoadedModel) -> Prepared:
    """The pairs with what the policy says of them now, before its first step."""
    # what is merged, and what is trained in full, is rounded at other places: in 16 bits other numbers
    form = {"full": settings.finetuning_type == "full", "merged": _name(prepared.under)}
    identity = _identity(settings, loaded, prepared.base, form | {"adapter": _name(prepared.start)})
    return _fill(settings, prepared, _Scorer(backend, identity))


def named_references(settings: Settings, prepared: Prepared, reference: NamedReference, backend_name: str) -> Prepared:
    """The pairs with what another model says of them; it is loaded, asked and let go."""
    base, adapter = reference.base, reference.adapter
    lora = spec_of_adapter(adapter) if adapter is not None else None
    spec = replace(model_spec(settings, prepared), folder=base.path, lora=lora, under=None, full=False)
    backend = load_backend(backend_name)
    loaded = _load(backend, spec, adapter, base)
    form = {"full": False, "merged": None, "adapter": _name(adapter)}
    filled = _fill(settings, prepared, _Scorer(backend, _identity(settings, loaded, base, form)))
    del backend
    gc.collect()
    return filled


def _load(backend: Backend, spec: ModelSpec, adapter: Adapter | None, base: ModelFolder) -> LoadedModel:
    if adapter is None:
        return backend.load(spec)
    with naming_adapter(adapter, base.name, ConfigError):
        loaded = backend.load(spec)
    with naming_adapter(adapter, base.name, ModelError):
        backend.set_adapter_state(adapter.state)
    return loaded


def _identity(settings: Settings, loaded: LoadedModel, base: ModelFolder, form: dict[str, object]) -> str:
    config = hashlib.sha256((base.path / "config.json").read_bytes()).hexdigest()
    parts = {
        "device": f"{settings.backend} {loaded.device} {loaded.precision}",
        "quantization_bit": settings.quantization_bit,
        "base": [weights_hash(base.path), config],
        **form,
    }
    return json.dumps(parts, sort_keys=True)


def _name(adapter: Adapter | None) -> object:
    """What tells one adapter from another, as JSON."""
    return [asdict(spec_of_adapter(adapter)), _hash_state(adapter.state)] if adapter is not None else None


def _hash_state(state: State) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.shape} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def _fill(settings: Settings, prepared: Prepared, scorer: _Scorer) -> Prepared:
    """The pairs with their references, as far as a step or an evaluation will need them."""
    train, valid = prepared.train, prepared.valid
    if isinstance(train, Pairs):
        assert isinstance(prepared.plan, Plan), "pairs are not streamed"
        visited = prepared.plan.visited
        columns = np.full((len(train), 3), math.nan)
        columns[visited] = _scored(settings, train.take(visited), scorer, "training")
        train = train.with_references(columns)
    if isinstance(valid, Pairs) and will_evaluate(settings, prepared.plan):
        valid = valid.with_references(_scored(settings, valid, scorer, "evaluation"))
    return replace(prepared, train=train, valid=valid)


def _scored(settings: Settings, pairs: Pairs, scorer: _Scorer, what: str) -> np.ndarray:
    """float64 [pairs, 3]: the fields of each Reference."""
    path = cache_dir() / "reference" / f"{_key(settings, pairs, scorer.identity)}.safetensors"
    columns = _read(path, len(pairs), with_perplexity=settings.asks_prompts)
    if columns is not None:
        logger.info("reference: %s, already known (%s)", plural(len(pairs), f"{what} pair"), path)
    else:
        columns = _compute(settings, pairs, scorer.backend, what)
        _keep(path, columns)
    return columns


def _key(settings: Settings, pairs: Sequence[TokenizedPair], identity: str) -> str:
    expected = f"{_FORMAT} {settings.asks_prompts} {settings.ld_alpha} {identity} {len(pairs)}"
    digest = hashlib.sha256(expected.encode())
    for pair in pairs:
        digest.update(f"{pair.prompt_length} {len(pair.chosen.tokens)} {len(pair.rejected.tokens)} ".encode())
        digest.update(pair.chosen.tokens.tobytes())
        digest.update(pair.rejected.tokens.tobytes())
    return digest.hexdigest()[:32]


def _read(path: Path, pairs: int, *, with_perplexity: bool) -> np.ndarray | None:
    """float64 [pairs, 3], or None if there is no whole file: a cache is computed again rather than trusted."""
    try:
        columns = load_file(path)["columns"]
    except (OSError, SafetensorError, KeyError):
        return None
    is_sound = columns.shape == (pairs, 3) and columns.dtype == np.float64
    return columns if is_sound and np.isfinite(columns[:, : 3 if with_perplexity else 2]).all() else None


def _keep(path: Path, columns: np.ndarray) -> None:
    """Write the cache; without it the run goes on all the same, and the next one computes again."""
    try:
        write_state(path, {"columns": columns}, dtype=np.float64)
    except OSError as error:
        logger.warning("reference: not kept for later runs: %s: %s", path, error.strerror)


def _compute(settings: Settings, pairs: Sequence[TokenizedPair], backend: Backend, what: str) -> np.ndarray:
    """float64 [pairs, 3]: log-probabilities of chosen and rejected, log perplexity of the prompt (nan: not asked)."""
    columns = np.full((len(pairs), 3), math.nan)
    size = settings.per_device_train_batch_size
    start = time.perf_counter()
    batches = tracked(in_order(pairs, size), math.ceil(len(pairs) / size), f"reference, {what}")
    for indices, batch in batches:
        logps = backend.logps(batch, answer_positions(batch, with_prompt=settings.asks_prompts))
        chosen, rejected, perplexity = reference_columns(logps, batch, settings.ld_alpha)
        columns[indices, 0], columns[indices, 1] = chosen, rejected
        if settings.asks_prompts:
            columns[indices, 2] = perplexity
    logger.info("reference: %s in %.1f s", plural(len(pairs), f"{what} pair"), time.perf_counter() - start)
    if not np.isfinite(columns[:, :2]).all():
        raise ModelError("reference: log-probabilities that are not finite; compute in float32 (bf16=false)")
    return columns
