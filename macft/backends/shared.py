"""Decide what must be the same on both engines: first values, random seeds, targets, parts of a step, notes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from macft.backends.base import ModelSpec
from macft.backends.batch_layout import split_by_tokens
from macft.errors import ConfigError, ModelError
from macft.objectives.batch import NumpyBatch
from macft.weights.adapters.peft import State

# The head computes so many logits at a time: 32 MB in float32.
LOGITS_AT_ONCE = 1 << 23
# On a GPU, whose memory each chunk reads the head from, it is so many at most: 1 GB with what is kept beside them.
GPU_LOGITS_AT_ONCE = 1 << 26
# On a CPU the activations of a step are bounded by passes of so many tokens.
CPU_TOKENS_AT_ONCE = 1024

# Their norms multiply by 1 + weight.
_NORMS_AROUND_ZERO = ("gemma", "gemma2", "gemma3", "gemma3_text")
_NOT_TARGETS = frozenset({"gate", "router", "shared_expert_gate", "lm_head"})


def initial_value(config: Mapping[str, Any], seed: int, name: str, shape: Sequence[int]) -> np.ndarray:
    """float32 `shape`, a parameter's first value: normal with `initializer_range` for a matrix, 1 for a norm, else 0.

    Each name has its own random numbers, so that their order does not matter. Raises ModelError for what
    is neither: a vector of another kind, or a stack of matrices, which engines cut in different ways.
    """
    if len(shape) == 2:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        spread = np.float32(config.get("initializer_range", 0.02))
        value: np.ndarray = rng.standard_normal(tuple(shape), dtype=np.float32) * spread
        return value
    owner, _, kind = name.rpartition(".")
    if len(shape) == 1 and kind == "bias":
        return np.zeros(tuple(shape), dtype=np.float32)
    if len(shape) == 1 and kind == "weight" and "norm" in owner.rpartition(".")[2]:
        start = 0.0 if config["model_type"] in _NORMS_AROUND_ZERO else 1.0
        return np.full(tuple(shape), start, dtype=np.float32)
    raise ModelError(
        f"train_from_scratch: no first value is known for {name} {list(shape)} of a {config['model_type']} model; "
        "take a dense model (llama, qwen2, qwen3, gemma3_text, mistral, ...)"
    )


def initial_lora_a(seed: int, name: str, rank: int, width: int) -> np.ndarray:
    """LoRA A [rank, width] of one parameter: uniform in +-1/sqrt(width), the same on every engine."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    bound = 1.0 / np.sqrt(width)
    return rng.uniform(-bound, bound, size=(rank, width)).astype(np.float32)


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """A seed for one micro-batch's dropout: a run that resumes draws what it would have drawn."""
    return int(np.random.SeedSequence([seed, step, micro_batch, rank]).generate_state(1)[0])


def is_decayed(shape: Sequence[int]) -> bool:
    """Weight decay is for matrices: biases, norms and DoRA magnitudes are left alone."""
    return len(shape) > 1


def select_targets(linears: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Full names of the linear modules that `lora_target` asks for, in the model's order.

    `linears` are the linear modules inside the blocks. `all` leaves out routers. Raises ConfigError for an entry that
    matches none of them, ModelError when there is nothing to choose from.
    """
    if tuple(targets) == ("all",):
        chosen = {name for name in linears if name.rpartition(".")[2] not in _NOT_TARGETS}
    else:
        chosen = set()
        for entry in targets:
            matches = {name for name in linears if name == entry or name.endswith(f".{entry}")}
            if linears and not matches:
                known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
                raise ConfigError(f"lora_target {entry!r} matches no linear layer; this model has {known}")
            chosen |= matches
    if not chosen:
        raise ModelError(
            "lora_target: found no linear layers in the blocks of this model to put an adapter on; set finetuning_type "
            "to full, or take another model"
        )
    return [name for name in linears if name in chosen]


def check_state_fits(state: State, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ModelError, naming all that do not fit, unless a state has the model's parameters in their shapes."""
    problems = [f"missing {name}" for name in shapes if name not in state]
    problems += [f"unknown {name}" for name in state if name not in shapes]
    problems += [
        f"{name} has shape {list(state[name].shape)}, the model expects {list(shape)}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ModelError(f"the adapter does not fit this model: {'; '.join(problems[:3])}{more}")


def step_parts(
    micro_batches: Sequence[NumpyBatch], tokens_at_once: int | None, *, packs: bool
) -> Iterator[tuple[int, NumpyBatch]]:
    """The passes of one optimizer step, numbered from 0."""
    return enumerate(part for batch in micro_batches for part in split_by_tokens(batch, tokens_at_once, packs=packs))


def load_notes(spec: ModelSpec, *, has_lm_head: bool, packs: bool, rope_problem: str | None) -> list[str]:
    """What the user is told of a model that cannot be computed in the frugal ways."""
    notes = []
    if not has_lm_head:
        notes.append("this architecture hides its head: logits are computed at every position")
    if spec.packing and not packs:
        reason = rope_problem or (
            "in this architecture the examples of one row influence each other (a recurrent state, or no mask)"
        )
        notes.append(f"packing is off: {reason}; the steps are the same, with every example in a row of its own")
    return notes
