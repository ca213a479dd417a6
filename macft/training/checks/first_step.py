"""Check that a run whose reference is its own policy starts at the loss of margin 0."""

from __future__ import annotations

from macft.backends.base import StepResult
from macft.errors import MacftError
from macft.objectives.kto import Kto
from macft.objectives.losses import Objective
from macft.objectives.preference import Preference

# Of the loss at pref_beta 0.1; 16-bit sums over answers of hundreds of tokens are no more accurate.
_TOLERANCE = {"float32": 1e-4}
_TOLERANCE_16_BITS = 2e-2
_USUAL_BETA = 0.1
# Rewards of two pairs could be wrong in opposite ways: their means get this many times the tolerance.
_REWARD_ROOM = 10


def check_start(objective: Objective, result: StepResult, precision: str) -> None:
    """Raise MacftError unless rewards are 0 and the loss, without its SFT part, is that of rewards 0 (sigmoid: ln 2).

    Anything else means that policy and reference are not the same model, or score different tokens.
    """
    metrics = result.metrics
    if isinstance(objective, Kto):
        name, expected, sft = "kto", objective.start_loss(metrics["share/chosen"]), metrics.get("sft_loss", 0.0)
        sft *= metrics["share/chosen"]
    elif isinstance(objective, Preference) and objective.start_loss is not None:
        name, expected, sft = objective.loss, objective.start_loss, metrics.get("sft_loss", 0.0)
    else:
        return
    found = result.loss - objective.ftx * sft
    # rounding of log-probabilities comes out multiplied by beta
    tolerance = _TOLERANCE.get(precision, _TOLERANCE_16_BITS) * max(1.0, expected, objective.beta / _USUAL_BETA)
    rewards = [metrics[key] for key in ("rewards/chosen", "rewards/rejected") if key in metrics]
    # the KL term is a reward too, of answers to other prompts
    rewards += [objective.beta * metrics["kl"]] if "kl" in metrics else []
    shown = " and ".join(f"{reward:+.4f}" for reward in rewards)
    if abs(found - expected) > tolerance or max(map(abs, rewards)) > _REWARD_ROOM * tolerance:
        raise MacftError(
            f"step 1: the {name} loss is {found:.6f} with rewards {shown}, and must be {expected:.6f} "
            "with rewards 0 while the policy is its own reference; training would follow a wrong signal. Compute in "
            "float32 (bf16=false); if that does not help, delete the reference folder in the cache, which may hold "
            "older numbers"
        )
