"""Warn, in one line each, about settings, data and curves that suggest a run is going wrong."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from macft.config.settings import Settings
from macft.data.tokenization.table import Rows, fingerprints

# Peak learning rates that preference training was seen to tolerate, by finetuning_type.
_RATES = {"lora": (1e-7, 1e-4), "full": (1e-8, 5e-6)}

# Steps that a trend is read from; one step can hold a single pair.
_WINDOW = 20
# A fall of the chosen answers that matters: in rewards (5 nats per answer at pref_beta 0.1) ...
_REWARD_FALL = 0.5
# ... or, where nothing is subtracted from the log-probabilities, in nats per token.
_LOGP_FALL = 0.25
# The least training margin, and the least gap to the evaluation's, that say anything.
_MARGIN_GAP = 0.2
_STEPS_FOR_MARGIN = 5


def learning_rate_alarm(settings: Settings) -> str | None:
    """A peak learning rate that preference training does not tolerate: outside LoRA [1e-7, 1e-4], full [1e-8, 5e-6]."""
    if not settings.is_preference:
        return None
    rate, (low, high) = settings.learning_rate, _RATES[settings.finetuning_type]
    if low <= rate <= high:
        return None
    risk = "the model is likely to break" if rate > high else "the model will hardly change"
    return (
        f"learning_rate {rate:g}: {risk}; preference training with finetuning_type {settings.finetuning_type} "
        f"takes one between {low:g} and {high:g}"
    )


# The paper's range (8) of weight x rows, desirable to undesirable.
_BALANCE = (1.0, 4 / 3)


def balance_alarm(settings: Settings, is_desirable: np.ndarray) -> str | None:
    """KTO on rows of one rating, or whose weights do not bring desirable and other rows to 1 to 4/3."""
    count = len(is_desirable)
    desirable = int(is_desirable.sum())
    others = count - desirable
    if not desirable or not others:
        rating, missing = ("desirable", "undesirable") if desirable else ("undesirable", "desirable")
        return (
            f"all {count} rows are rated {rating}: KTO learns from both ratings; add {missing} rows"
            f"{', or set stage: sft' if desirable else ''}"
        )
    chosen, rejected = settings.kto_chosen_weight, settings.kto_rejected_weight
    low, high = _BALANCE
    # rounded as the bounds that are shown are
    if not rejected or low <= round(chosen * desirable / (rejected * others), 2) <= round(high, 2):
        return None
    bounds = [rejected * others / desirable * bound for bound in _BALANCE]
    other_bounds = [chosen * desirable / others / bound for bound in reversed(_BALANCE)]
    return (
        f"{desirable} desirable and {others} undesirable rows, weighted {chosen:g} and {rejected:g}: "
        f"{chosen * desirable / (rejected * others):.2f} to 1, and KTO's authors take 1 to 1.33; set "
        f"kto_chosen_weight between {bounds[0]:.3g} and {bounds[1]:.3g}, or kto_rejected_weight between "
        f"{other_bounds[0]:.3g} and {other_bounds[1]:.3g}"
    )


def overlap_alarm(train: Rows, valid: Rows) -> str | None:
    """Evaluation rows whose tokens (of a pair: of both answers) are also those of a training row."""
    count = _repeated(fingerprints(train), fingerprints(valid)) if len(valid) else 0
    if not count:
        return None
    return (
        f"evaluation: {count} of {len(valid)} rows ({100 * count / len(valid):.0f} %) are also training rows, so it "
        "shows what was memorized; remove the duplicates, or evaluate on other data"
    )


def _repeated(train: np.ndarray, valid: np.ndarray) -> int:
    """How many of `valid`, usually the smaller one, are in `train`, which need not be sorted."""
    known = np.unique(valid)
    at = np.minimum(np.searchsorted(known, train), len(known) - 1)
    return int(np.isin(valid, known[at[known[at] == train]]).sum())


class CurveAlarms:
    """Watches the curves of a preference run; every alarm is raised once in the life of the object.

    Chosen answers become less likely: over the last 20 steps `rewards/chosen` is below -0.5 on
    average and still falling while `rewards/margins` rises (later half of the steps against the
    earlier half). Without a reference: `logps/chosen_avg` is 0.25 below its first 10 steps, instead.

    Evaluation falls behind: `eval_rewards/margins` is below half the mean training margin of the
    last 20 steps (5 at least), and the gap is above 0.2, as is the training margin.
    """

    def __init__(self, *, has_reference: bool) -> None:
        self._key = "rewards/chosen" if has_reference else "logps/chosen_avg"
        self._fall = _REWARD_FALL if has_reference else _LOGP_FALL
        # with a reference, rewards start at 0 by definition
        self._start: float | None = 0.0 if has_reference else None
        self._chosen: deque[float] = deque(maxlen=_WINDOW)
        self._margins: deque[float] = deque(maxlen=_WINDOW)
        self._said: set[str] = set()

    def step(self, values: Mapping[str, float]) -> list[str]:
        """Record the metrics of a training step; returns the alarms that they set off."""
        if self._key not in values or "rewards/margins" not in values:
            return []
        self._chosen.append(values[self._key])
        self._margins.append(values["rewards/margins"])
        if self._start is None and len(self._chosen) == _WINDOW // 2:
            self._start = _mean(list(self._chosen))
        if len(self._chosen) < _WINDOW or self._start is None:
            return []
        lost = self._start - _mean(list(self._chosen))
        if not (lost > self._fall and _rise(self._chosen) < 0 < _rise(self._margins)):
            return []
        margin = _mean(list(self._margins)[_WINDOW // 2 :])
        what = f"{self._key} has fallen by {lost:.2f} while the margin rises (now {margin:+.2f})"
        return self._once(
            "chosen",
            f"{what}: chosen answers become less likely too, only slower than rejected ones, and text may degrade; "
            "set pref_ftx (0.1 to 1), lower learning_rate, or train for fewer steps",
        )

    def evaluation(self, values: Mapping[str, float]) -> list[str]:
        """Record the metrics of an evaluation (`eval_...`); returns the alarms that they set off."""
        held_out = values.get("eval_rewards/margins")
        if held_out is None or len(self._margins) < _STEPS_FOR_MARGIN:
            return []
        trained = _mean(list(self._margins))
        if not (trained > _MARGIN_GAP and held_out < 0.5 * trained and trained - held_out > _MARGIN_GAP):
            return []
        return self._once(
            "margin",
            f"the evaluation's margin is {held_out:+.2f}, that of the last training steps {trained:+.2f}: the run "
            "memorizes its rows; train for fewer steps (early_stopping_steps stops by itself), or on more rows",
        )

    def _once(self, name: str, text: str) -> list[str]:
        if name in self._said:
            return []
        self._said.add(name)
        return [text]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rise(values: Sequence[float]) -> float:
    """By how much the mean of the later half lies above that of the earlier half."""
    ordered = list(values)
    middle = len(ordered) // 2
    return _mean(ordered[middle:]) - _mean(ordered[:middle])
