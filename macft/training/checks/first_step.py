"""Check that a run whose reference is its own policy starts at the loss of margin 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

from macft.backends.base import StepResult
from macft.errors import MacftError
from macft.objectives.batch import NumpyBatch
from macft.objectives.kto import Kto
from macft.objectives.losses import Objective
from macft.objectives.preference import Preference

# Of the loss at pref_beta 0.1, in float32.
_TOLERANCE = 1e-4
_USUAL_BETA = 0.1
# Rewards of two pairs could be wrong in opposite ways: their means get this many times the tolerance.
_REWARD_ROOM = 10
# In 16 bits the log-probability of a token is off by so many nats (root mean square; 0.03 to 0.05 were measured) when
# other kernels compute it. What two deviations of a margin do not explain is told, what ten do not is an error.
_NOISE_16_BITS = 0.07
_TOLD, _REFUSED = 2, 10
_LEAST_16_BITS = 2e-2


def check_start(
    objective: Objective, result: StepResult, micro_batches: Sequence[NumpyBatch], precision: str
) -> str | None:
    """Raise MacftError unless rewards are 0 and the loss, without its SFT part, is that of rewards 0 (sigmoid: ln 2).

    Anything else means that policy and reference are not the same model, or score different tokens. In 16 bits, where
    the kernels of the two round differently, returns a warning for what may still be rounding.
    """
    metrics = result.metrics
    if isinstance(objective, Kto):
        name, expected, sft = "kto", objective.start_loss(metrics["share/chosen"]), metrics.get("sft_loss", 0.0)
        sft *= metrics["share/chosen"]
    elif isinstance(objective, Preference) and objective.start_loss is not None:
        name, expected, sft = objective.loss, objective.start_loss, metrics.get("sft_loss", 0.0)
    else:
        return None
    found = result.loss - objective.ftx * sft
    # rounding of log-probabilities comes out multiplied by beta
    tolerance = _TOLERANCE * max(1.0, expected, objective.beta / _USUAL_BETA)
    told, refused, reward_room = tolerance, tolerance, float(_REWARD_ROOM)
    if precision != "float32":
        # of a margin, which no loss multiplies by more than this
        noise = objective.beta * _NOISE_16_BITS * math.sqrt(2 * _tokens_per_pair(micro_batches))
        told = max(_TOLD * noise, _LEAST_16_BITS / _TOLERANCE * tolerance)
        refused, reward_room = told * _REFUSED / _TOLD, 1.0
    rewards = [metrics[key] for key in ("rewards/chosen", "rewards/rejected") if key in metrics]
    # the KL term is a reward too, of answers to other prompts
    rewards += [objective.beta * metrics["kl"]] if "kl" in metrics else []
    shown = " and ".join(f"{reward:+.4f}" for reward in rewards)
    off_by = max(abs(found - expected), max(map(abs, rewards)) / reward_room)
    if off_by <= told:
        return None
    text = (
        f"step 1: the {name} loss is {found:.6f} with rewards {shown}, and must be {expected:.6f} with rewards 0 "
        "while the policy is its own reference"
    )
    if off_by <= refused:
        return f"{text}: more than rounding to {precision} explains; bf16=false computes in float32"
    # a NaN is larger than nothing, and ends here
    raise MacftError(
        f"{text}; training would follow a wrong signal. Compute in float32 (bf16=false); if that does not help, delete "
        "the reference folder in the cache, which may hold older numbers"
    )


def _tokens_per_pair(micro_batches: Sequence[NumpyBatch]) -> float:
    """The tokens of the longest answer, divided by the number of answers whose noise averages out."""
    longest = max(int(batch.loss_mask.sum(axis=1).max()) for batch in micro_batches)
    pairs = sum(len(batch.tokens) // 2 for batch in micro_batches)
    return longest / max(1, pairs)
