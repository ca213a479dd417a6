"""Score preference pairs with transformers and PEFT, in float32 and one row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from macft.data.tokenization.table import TokenizedPair


def scores(model: Path, pairs: Sequence[TokenizedPair], adapter: Path | None = None) -> np.ndarray:
    """float64 [pairs, 3]: summed log-probabilities of chosen and of rejected answers, log perplexity of the prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        network = PeftModel.from_pretrained(network, adapter)
    network.eval()
    found = []
    for pair in pairs:
        sums = []
        for row in (pair.chosen, pair.rejected):
            tokens = torch.from_numpy(row.tokens).long()
            with torch.inference_mode():
                logps = torch.log_softmax(network(input_ids=tokens[None]).logits[0, :-1].double(), -1)
            logps = logps.gather(-1, tokens[1:, None])[:, 0].numpy()
            sums.append(logps[pair.prompt_length - 1 :].sum())
        found.append([*sums, -logps[: pair.prompt_length - 1].mean()])
    return np.array(found)


def dpo_metrics(policy: np.ndarray, reference: np.ndarray, beta: float | np.ndarray = 0.1) -> dict[str, float]:
    """Means over pairs of the sigmoid loss and of what is logged with it; `beta` is one number, or one a pair."""
    rewards = np.reshape(beta, (-1, 1)) * (policy - reference)[:, :2]
    margins = rewards[:, 0] - rewards[:, 1]
    values = {
        "loss": np.log1p(np.exp(-margins)),
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/accuracies": rewards[:, 0] > rewards[:, 1],
        "rewards/margins": margins,
        "logps/chosen": policy[:, 0],
        "logps/rejected": policy[:, 1],
    }
    return {name: float(np.mean(value)) for name, value in values.items()}
