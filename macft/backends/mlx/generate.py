"""Generate tokens with mlx-lm's cache, pipelining and samplers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from macft.backends.base import Sampling
from macft.errors import ModelError

# In place of a token. Looking at its score on the host would wait for the device at every token.
_NOT_FINITE = -1


def _marking(sampler: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """The sampler, with a mark where the chosen token's score is not finite."""

    def sample(scores: mx.array) -> mx.array:
        tokens = sampler(scores)
        chosen = mx.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0]
        return mx.where(mx.isfinite(chosen), tokens.astype(mx.int32), _NOT_FINITE)

    return sample


def generate(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    sampling: Sampling,
) -> Iterator[int]:
    """Yield new token ids one by one, without the stop token; raises ModelError for scores that are not finite."""
    mx.random.seed(sampling.seed)
    sampler = make_sampler(temp=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p)
    penalty = sampling.repetition_penalty
    processors = make_logits_processors(
        repetition_penalty=penalty if penalty != 1.0 else None,
        repetition_context_size=len(prompt) + max_new_tokens,
    )
    model.eval()
    steps = generate_step(
        mx.array(list(prompt)),
        model,
        max_tokens=max_new_tokens,
        sampler=_marking(sampler),
        logits_processors=processors,
    )
    for token, _ in steps:
        token_id = int(token)
        if token_id == _NOT_FINITE:
            raise ModelError(
                "the scores of the next token are not finite: the model's numbers overflow, or its weights are broken; "
                "compute in float32 (bf16=false), or take another checkpoint"
            )
        if token_id in stop_ids:
            return
        yield token_id
