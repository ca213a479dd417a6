"""List the values of `pref_loss`: each is a function of the terms of its pairs, and a row of the table.

S is the log-probability of an answer (c: chosen, r: rejected), A its mean over the n tokens, ref S and ref A the
reference's, delta = (S_c - ref S_c) - (S_r - ref S_r), s(x) = 1 / (1 + e^-x).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # settings are checked against this table, and need no NumPy for it
    from macft.objectives.ops import Array, Ops

# An average log-probability of 0 has infinite odds.
_ORPO_CEILING = -1e-6


@dataclass(frozen=True, kw_only=True)
class Options:
    """The numbers of a configuration that losses depend on."""

    beta: float = 0.1  # where it differs from pair to pair, the one of the terms counts
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5


@dataclass(frozen=True)
class Terms:
    """The arguments of the losses, each [pairs]."""

    chosen: Array  # S_c
    rejected: Array  # S_r
    chosen_avg: Array  # A_c
    rejected_avg: Array  # A_r
    chosen_ratio: Array  # S_c - ref S_c; without a reference A_c
    rejected_ratio: Array
    chosen_tokens: Array  # n_c
    rejected_tokens: Array
    beta: Array


def _sigmoid(ops: Ops, terms: Terms, options: Options) -> tuple[Array, dict[str, Array]]:
    """-(1-e) log s(beta delta) - e log s(-beta delta): DPO, cDPO with smoothing e."""
    margin, e = _margin(terms), options.label_smoothing
    if e == 0.0:
        return -ops.log_sigmoid(margin), {}
    return -(1.0 - e) * ops.log_sigmoid(margin) - e * ops.log_sigmoid(-margin), {}


def _robust(ops: Ops, terms: Terms, options: Options) -> tuple[Array, dict[str, Array]]:
    """(-(1-e) log s(beta delta) + e log s(-beta delta)) / (1 - 2e)."""
    margin, e = _margin(terms), options.label_smoothing
    return (e * ops.log_sigmoid(-margin) - (1.0 - e) * ops.log_sigmoid(margin)) / (1.0 - 2.0 * e), {}


def _hinge(ops: Ops, terms: Terms, _options: Options) -> tuple[Array, dict[str, Array]]:
    """max(0, 1 - beta delta)   (SLiC)."""
    return ops.maximum(1.0 - _margin(terms), 0.0), {}


def _ipo(_ops: Ops, terms: Terms, _options: Options) -> tuple[Array, dict[str, Array]]:
    """((A_c - ref A_c) - (A_r - ref A_r) - 1/(2 beta))^2, per token."""
    margin = terms.chosen_ratio / terms.chosen_tokens - terms.rejected_ratio / terms.rejected_tokens
    distance = margin - 1.0 / (2.0 * terms.beta)
    return distance * distance, {}


def _apo_zero(ops: Ops, terms: Terms, _options: Options) -> tuple[Array, dict[str, Array]]:
    """(1 - s(beta (S_c - ref S_c))) + s(beta (S_r - ref S_r))."""
    chosen, rejected = terms.beta * terms.chosen_ratio, terms.beta * terms.rejected_ratio
    return one_minus_sigmoid(ops, chosen) + one_minus_sigmoid(ops, -rejected), {}


def _apo_down(ops: Ops, terms: Terms, _options: Options) -> tuple[Array, dict[str, Array]]:
    """s(beta (S_c - ref S_c)) + (1 - s(beta delta))."""
    return one_minus_sigmoid(ops, -terms.beta * terms.chosen_ratio) + one_minus_sigmoid(ops, _margin(terms)), {}


def _orpo(ops: Ops, terms: Terms, _options: Options) -> tuple[Array, dict[str, Array]]:
    """-A_c - beta log s(log odds_c - log odds_r), log odds = A - log(1 - e^A)."""
    odds = ops.log_sigmoid(_log_odds(ops, terms.chosen_avg) - _log_odds(ops, terms.rejected_avg))
    return -terms.chosen_avg - terms.beta * odds, {"sft_loss": -terms.chosen_avg, "odds_ratio_loss": -odds}


def _simpo(ops: Ops, terms: Terms, options: Options) -> tuple[Array, dict[str, Array]]:
    """-log s(beta (A_c - A_r) - gamma)."""
    return -ops.log_sigmoid(terms.beta * (terms.chosen_avg - terms.rejected_avg) - options.simpo_gamma), {}


def one_minus_sigmoid(ops: Ops, x: Array) -> Array:
    """1 - s(x) = s(-x), exact near 0."""
    return -ops.expm1(ops.log_sigmoid(x))


def _margin(terms: Terms) -> Array:
    return terms.beta * (terms.chosen_ratio - terms.rejected_ratio)


def _log_odds(ops: Ops, average: Array) -> Array:
    average = ops.minimum(average, _ORPO_CEILING)
    return average - ops.log(-ops.expm1(average))


@dataclass(frozen=True)
class Loss:
    """A value of `pref_loss`."""

    # -> (loss [pairs], its own metrics)
    function: Callable[[Any, Terms, Options], tuple[Any, dict[str, Any]]]
    paper: str  # arXiv
    start: Callable[[Options], float] | None  # of a policy that is its own reference; None: it compares with none
    of_averages: bool = False  # whether it takes means over the tokens of an answer
    options: frozenset[str] = frozenset()  # keys of a configuration that apply to this loss
    in_foodpo: bool = False  # whether it takes a beta for each prompt

    @property
    def needs_reference(self) -> bool:
        """Whether it compares the policy with a reference."""
        return self.start is not None


_SMOOTHING = frozenset({"dpo_label_smoothing"})

LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(_sigmoid, "2305.18290", lambda _: math.log(2.0), options=_SMOOTHING, in_foodpo=True),
    "hinge": Loss(_hinge, "2305.10425", lambda _: 1.0),
    "ipo": Loss(_ipo, "2310.12036", lambda options: 1 / (4 * options.beta**2), of_averages=True),
    "robust": Loss(_robust, "2403.00409", lambda _: math.log(2.0), options=_SMOOTHING),
    "apo_zero": Loss(_apo_zero, "2408.06266", lambda _: 1.0),
    "apo_down": Loss(_apo_down, "2408.06266", lambda _: 1.0),
    "orpo": Loss(_orpo, "2403.07691", None, of_averages=True, in_foodpo=True),
    "simpo": Loss(_simpo, "2405.14734", None, of_averages=True, options=frozenset({"simpo_gamma"}), in_foodpo=True),
}


def losses_where(holds: Callable[[Loss], bool], joint: str = "and") -> str:
    """The names of those losses as a phrase: `sigmoid, orpo and simpo`."""
    *others, last = (name for name, loss in LOSSES.items() if holds(loss))
    return f"{', '.join(others)} {joint} {last}" if others else last


def losses_with(option: str) -> str:
    """The names of the losses that a key of a configuration applies to."""
    return losses_where(lambda loss: option in loss.options)
