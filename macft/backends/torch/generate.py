"""Generate tokens with a key-value cache and transformers' samplers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from macft.backends.base import Sampling
from macft.errors import ModelError


def generate(
    model: torch.nn.Module,
    prompt: Sequence[int],
    *,
    device: torch.device,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    sampling: Sampling,
) -> Iterator[int]:
    """Yield new token ids one by one, without the stop token."""
    random = torch.Generator(device="cpu").manual_seed(sampling.seed)
    processors = _processors(sampling)
    model.eval()
    seen = torch.tensor([list(prompt)], device=device)
    inputs, cache = seen, None
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            logits = output.logits[:, -1].float()
            if not logits.max() < torch.inf:
                raise ModelError("the logits of the next token are not finite; load the model in float32 (bf16=false)")
            scores = processors(seen, logits)
            if sampling.temperature > 0:
                weights = torch.softmax(scores, dim=-1).cpu()
                chosen = torch.multinomial(weights, 1, generator=random).to(device)
            else:
                chosen = scores.argmax(dim=-1, keepdim=True)
            inputs = chosen
            seen = torch.cat([seen, chosen], dim=1)
        token = int(chosen)
        if token in stop_ids:
            return
        yield token


def _processors(sampling: Sampling) -> LogitsProcessorList:
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        chain.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            chain.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            chain.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0.0:
            chain.append(MinPLogitsWarper(sampling.min_p))
    return chain
