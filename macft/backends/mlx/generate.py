"""Generate tokens with mlx-lm's cache, pipelining and samplers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from macft.backends.base import Sampling


def generate(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    sampling: Sampling,
) -> Iterator[int]:
    """Yield new token ids one by one, without the stop token."""
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
        sampler=sampler,
        logits_processors=processors,
    )
    for token, _ in steps:
        token_id = int(token)
        if token_id in stop_ids:
            return
        yield token_id
