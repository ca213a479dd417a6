"""Preference objectives, DPO and FooDPO: log-probabilities of chosen and rejected rows in, a summed loss out.

Rows 0..P-1 of a batch are chosen, rows P..2P-1 rejected. S is the log-probability of a completion, A its
mean over the n tokens, a hat marks the reference, delta = (S_c - ref S_c) - (S_r - ref S_r).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from macft.config.settings import OF_AVERAGES, WITHOUT_REFERENCE
from macft.data.batches import Batch, NumpyBatch
from macft.errors import MacftError
from macft.objectives.ops import Array, NumpyOps, Ops

# An average log-probability of 0 has infinite odds.
_ORPO_CEILING = -1e-6


@dataclass(frozen=True)
class PromptBeta:
    """FooDPO: the strength of a pair is pref_beta * scale * log PPL(prompt)."""

    scale: float
    source: Literal["reference", "policy", "policy_with_gradient"] = "reference"
    low: float | None = None
    high: float | None = None

    def strengths(self, beta: float, log_perplexities: np.ndarray) -> np.ndarray:
        """beta(x) of prompts of two tokens or more, [pairs]."""
        return np.asarray(self.limited(NumpyOps(), beta * self.scale * log_perplexities))

    def limited(self, ops: Ops, strength: Array) -> Array:
        """The strength between `low` and `high`."""
        if self.low is not None:
            strength = ops.maximum(strength, self.low)
        return strength if self.high is None else ops.minimum(strength, self.high)


@dataclass(frozen=True)
class Terms:
    """What the losses are functions of, each [pairs]."""

    chosen: Array  # S_c
    rejected: Array  # S_r
    chosen_avg: Array  # A_c
    rejected_avg: Array  # A_r
    chosen_ratio: Array  # S_c - ref S_c; without a reference A_c
    rejected_ratio: Array
    chosen_tokens: Array  # n_c
    rejected_tokens: Array
    beta: Array


@dataclass(frozen=True)
class Preference:
    """One of `LOSSES` over pairs, with `ftx` times the SFT loss of the chosen answer added."""

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    ftx: float = 0.0
    ld_alpha: float | None = None
    prompt_beta: PromptBeta | None = None  # None: every pair has `beta`

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.loss not in WITHOUT_REFERENCE

    @property
    def start_loss(self) -> float | None:
        """The loss, without its SFT part, of a policy that is its own reference; None if it has none."""
        return {"sigmoid": np.log(2.0), "robust": np.log(2.0), "hinge": 1.0, "ipo": 1 / (4 * self.beta**2)}.get(
            self.loss
        )

    def weight(self, batch: NumpyBatch) -> float:
        """Pairs in the batch."""
        return float(len(batch.tokens) // 2)

    def positions(self, batch: NumpyBatch) -> np.ndarray:
        """The answers; the prompts too where the policy's own perplexity counts."""
        asks_policy = self.prompt_beta is not None and self.prompt_beta.source != "reference"
        return answer_positions(batch, with_prompt=asks_policy)

    def __call__(self, ops: Ops, logps: Array, batch: Batch[Array]) -> tuple[Array, dict[str, Array]]:
        """Sum over pairs of loss + ftx * (-A_c), and the sums of the metrics.

        Raises MacftError where the loss compares with a reference and the batch has none.
        """
        beta, perplexity = self._beta(ops, logps, batch)
        terms = self._terms(ops, logps, batch, beta)
        losses, metrics = LOSSES[self.loss](ops, terms, self)
        if self.ftx > 0:
            losses = losses - self.ftx * terms.chosen_avg
            metrics["sft_loss"] = -terms.chosen_avg
        metrics |= self._metrics(terms)
        if perplexity is not None:
            metrics["log_prompt_perplexity"] = perplexity
            metrics["prompt_perplexity"] = ops.expm1(perplexity) + 1.0
            metrics["dynamic_beta"] = beta
        return ops.sum(losses), {name: ops.sum(value) for name, value in metrics.items()}

    def _beta(self, ops: Ops, logps: Array, batch: Batch[Array]) -> tuple[Array, Array | None]:
        """(beta [pairs], log PPL(prompt) [pairs]); plain DPO has the number `beta`, and no perplexity."""
        if self.prompt_beta is None:
            return self.beta, None
        if self.prompt_beta.source == "reference":
            perplexity = _known(
                batch.reference_log_perplexity,
                "foodpo_perplexity reference needs the reference's perplexities",
                "foodpo_perplexity policy",
            )
        else:
            perplexity = log_perplexity(ops, logps, batch)
        if self.prompt_beta.source == "policy":
            perplexity = ops.stop_gradient(perplexity)
        beta = self.prompt_beta.limited(ops, self.beta * self.prompt_beta.scale * perplexity)
        # 1 where the prompt has a token to be surprised by, else 0
        has_prompt = ops.minimum(_prompt_tokens(ops, batch), 1.0)
        return has_prompt * beta + (1.0 - has_prompt) * self.beta, perplexity

    def _terms(self, ops: Ops, logps: Array, batch: Batch[Array], beta: Array) -> Terms:
        pairs = batch.tokens.shape[0] // 2
        mask = batch.loss_mask[:, 1:]
        tokens = ops.row_sum(mask)
        averages = ops.row_sum(logps * mask) / tokens
        chosen, rejected = answer_scores(ops, logps, batch, self.ld_alpha)
        if self.has_reference:
            reference = _known(
                batch.reference_logps,
                f"pref_loss {self.loss} needs the reference's log-probabilities",
                "pref_loss orpo or simpo",
            )
            ratios = chosen - reference[:pairs], rejected - reference[pairs:]
        else:
            ratios = averages[:pairs], averages[pairs:]
        return Terms(
            chosen=chosen,
            rejected=rejected,
            chosen_avg=averages[:pairs],
            rejected_avg=averages[pairs:],
            chosen_ratio=ratios[0],
            rejected_ratio=ratios[1],
            chosen_tokens=tokens[:pairs],
            rejected_tokens=tokens[pairs:],
            beta=beta,
        )

    def _metrics(self, terms: Terms) -> dict[str, Array]:
        chosen, rejected = terms.beta * terms.chosen_ratio, terms.beta * terms.rejected_ratio
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected) * 1.0,
            "rewards/margins": chosen - rejected,
            "logps/chosen": terms.chosen,
            "logps/rejected": terms.rejected,
        }
        if self.loss in OF_AVERAGES:
            metrics |= {"logps/chosen_avg": terms.chosen_avg, "logps/rejected_avg": terms.rejected_avg}
        return metrics


def _known(column: Array | None, need: str, way_out: str) -> Array:
    """A column that the reference fills before training."""
    if column is None:
        raise MacftError(f"{need}, and the batch has none; score the pairs with the reference, or take {way_out}")
    return column


def answer_positions(batch: NumpyBatch, *, with_prompt: bool) -> np.ndarray:
    """bool [rows, T-1]: next tokens of the answers, and of the prompts (once a pair)."""
    assert batch.prompt_mask is not None, "a preference objective takes pairs"
    mask = batch.loss_mask | batch.prompt_mask if with_prompt else batch.loss_mask
    return mask[:, 1:]


def answer_scores(ops: Ops, logps: Array, batch: Batch[Array], ld_alpha: float | None) -> tuple[Array, Array]:
    """(S_c [pairs], S_r [pairs]): summed answer log-probabilities.

    With `ld_alpha`, tokens past the length of the pair's shorter answer count that much (LD-DPO, arXiv 2409.06411).
    """
    mask = batch.loss_mask[:, 1:]
    pairs = mask.shape[0] // 2
    scores = ops.row_sum(logps * mask)
    chosen, rejected = scores[:pairs], scores[pairs:]
    if ld_alpha is None:
        return chosen, rejected
    # Both answers begin at the same token, so the tokens that both masks have are the common length.
    common = mask[:pairs] & mask[pairs:]
    chosen = ld_alpha * chosen + (1.0 - ld_alpha) * ops.row_sum(logps[:pairs] * common)
    rejected = ld_alpha * rejected + (1.0 - ld_alpha) * ops.row_sum(logps[pairs:] * common)
    return chosen, rejected


def log_perplexity(ops: Ops, logps: Array, batch: Batch[Array]) -> Array:
    """log PPL(prompt) [pairs]: mean negative log-likelihood of prompt tokens 1..P-1; 0 if there are none."""
    assert batch.prompt_mask is not None, "a preference objective takes pairs"
    pairs = logps.shape[0] // 2
    prompt = ops.row_sum(logps[:pairs] * batch.prompt_mask[:pairs, 1:])
    return -prompt / ops.maximum(_prompt_tokens(ops, batch), 1.0)


def reference_columns(
    logps: np.ndarray, batch: NumpyBatch, ld_alpha: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(S_c, S_r, log PPL(prompt)), each [pairs], of the model that gave `logps`, in double precision."""
    ops = NumpyOps()
    return *answer_scores(ops, logps, batch, ld_alpha), log_perplexity(ops, logps, batch)


def _prompt_tokens(ops: Ops, batch: Batch[Array]) -> Array:
    assert batch.prompt_mask is not None, "a preference objective takes pairs"
    return ops.row_sum(batch.prompt_mask[: batch.prompt_mask.shape[0] // 2, 1:])


def _sigmoid(ops: Ops, terms: Terms, settings: Preference) -> tuple[Array, dict[str, Array]]:
    """-(1-e) log s(beta delta) - e log s(-beta delta): DPO (arXiv 2305.18290), cDPO with smoothing e."""
    margin = terms.beta * (terms.chosen_ratio - terms.rejected_ratio)
    return _smoothed(ops, margin, settings.label_smoothing), {}


def _robust(ops: Ops, terms: Terms, settings: Preference) -> tuple[Array, dict[str, Array]]:
    """(-(1-e) log s(beta delta) + e log s(-beta delta)) / (1 - 2e)   (arXiv 2403.00409)."""
    margin = terms.beta * (terms.chosen_ratio - terms.rejected_ratio)
    e = settings.label_smoothing
    return (e * ops.log_sigmoid(-margin) - (1.0 - e) * ops.log_sigmoid(margin)) / (1.0 - 2.0 * e), {}


def _hinge(ops: Ops, terms: Terms, _settings: Preference) -> tuple[Array, dict[str, Array]]:
    """max(0, 1 - beta delta)   (SLiC, arXiv 2305.10425)."""
    return ops.maximum(1.0 - terms.beta * (terms.chosen_ratio - terms.rejected_ratio), 0.0), {}


def _ipo(_ops: Ops, terms: Terms, _settings: Preference) -> tuple[Array, dict[str, Array]]:
    """((A_c - ref A_c) - (A_r - ref A_r) - 1/(2 beta))^2   (arXiv 2310.12036, per token)."""
    margin = terms.chosen_ratio / terms.chosen_tokens - terms.rejected_ratio / terms.rejected_tokens
    distance = margin - 1.0 / (2.0 * terms.beta)
    return distance * distance, {}


def _orpo(ops: Ops, terms: Terms, _settings: Preference) -> tuple[Array, dict[str, Array]]:
    """-A_c - beta log s(log odds_c - log odds_r), log odds = A - log(1 - e^A)   (arXiv 2403.07691)."""
    odds = ops.log_sigmoid(_log_odds(ops, terms.chosen_avg) - _log_odds(ops, terms.rejected_avg))
    return -terms.chosen_avg - terms.beta * odds, {"sft_loss": -terms.chosen_avg, "odds_ratio_loss": -odds}


def _simpo(ops: Ops, terms: Terms, settings: Preference) -> tuple[Array, dict[str, Array]]:
    """-log s(beta (A_c - A_r) - gamma)   (arXiv 2405.14734)."""
    return -ops.log_sigmoid(terms.beta * (terms.chosen_avg - terms.rejected_avg) - settings.simpo_gamma), {}


def _smoothed(ops: Ops, margin: Array, e: float) -> Array:
    if e == 0.0:
        return -ops.log_sigmoid(margin)
    return -(1.0 - e) * ops.log_sigmoid(margin) - e * ops.log_sigmoid(-margin)


def _log_odds(ops: Ops, average: Array) -> Array:
    average = ops.minimum(average, _ORPO_CEILING)
    return average - ops.log(-ops.expm1(average))


Loss = Callable[[Ops, Terms, Preference], tuple[Array, dict[str, Array]]]

# The value of `pref_loss` -> (loss [pairs], metrics of its own).
LOSSES: dict[str, Loss] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "orpo": _orpo,
    "simpo": _simpo,
}
