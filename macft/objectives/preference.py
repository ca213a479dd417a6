"""Compute DPO and FooDPO, and their metrics, over pairs of a chosen and a rejected answer.

Rows 0..P-1 of a batch are chosen, rows P..2P-1 rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from macft.errors import MacftError
from macft.objectives.batch import Batch, NumpyBatch
from macft.objectives.losses import Objective
from macft.objectives.ops import Array, NumpyOps, Ops
from macft.objectives.preference_losses import LOSSES, Options, Terms, losses_where


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
class Preference(Options, Objective):
    """One of `LOSSES` over pairs, with `ftx` times the SFT loss of the chosen answer added."""

    loss: str = "sigmoid"
    ftx: float = 0.0
    ld_alpha: float | None = None
    prompt_beta: PromptBeta | None = None  # None: every pair has `beta`

    @property
    def start_loss(self) -> float | None:
        """The loss, without its SFT part, of a policy that is its own reference; None if it has none."""
        start = LOSSES[self.loss].start
        return None if start is None else start(self)

    def weight(self, batch: NumpyBatch) -> float:
        """Pairs in the batch."""
        return float(len(batch.tokens) // 2)

    def positions(self, batch: NumpyBatch) -> np.ndarray:
        """The answers; the prompts too where the policy's own perplexity counts."""
        asks_policy = self.prompt_beta is not None and self.prompt_beta.source != "reference"
        return answer_positions(batch, with_prompt=asks_policy)

    def __call__(self, ops: Ops, logps: Array, batch: Batch[Array]) -> tuple[Array, dict[str, Array]]:
        """Sum over pairs of loss + ftx * (-A_c), and the sums of the metrics.

        Raises MacftError if the loss compares with a reference and the batch has none.
        """
        beta, perplexity = self._beta(ops, logps, batch)
        terms = self._terms(ops, logps, batch, beta)
        losses, metrics = LOSSES[self.loss].function(ops, terms, self)
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
        # 1 where the prompt has a token to predict, else 0
        has_prompt = ops.minimum(_prompt_tokens(ops, batch), 1.0)
        return has_prompt * beta + (1.0 - has_prompt) * self.beta, perplexity

    def _terms(self, ops: Ops, logps: Array, batch: Batch[Array], beta: Array) -> Terms:
        pairs = batch.tokens.shape[0] // 2
        mask = batch.loss_mask[:, 1:]
        tokens = ops.row_sum(mask)
        averages = ops.row_sum(logps * mask) / tokens
        chosen, rejected = answer_scores(ops, logps, batch, self.ld_alpha)
        if LOSSES[self.loss].needs_reference:
            reference = _known(
                batch.reference_logps,
                f"pref_loss {self.loss} needs the reference's log-probabilities",
                f"pref_loss {losses_where(lambda loss: not loss.needs_reference, 'or')}",
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
        if LOSSES[self.loss].of_averages:
            metrics |= {"logps/chosen_avg": terms.chosen_avg, "logps/rejected_avg": terms.rejected_avg}
        return metrics


def _known(column: Array | None, need: str, way_out: str) -> Array:
    """A column that the reference fills in before training. Raises MacftError if it is missing."""
    if column is None:
        raise MacftError(f"{need}, and the batch has none; score the pairs with the reference, or use {way_out}")
    return column


def answer_positions(batch: NumpyBatch, *, with_prompt: bool) -> np.ndarray:
    """bool [rows, T-1]: next tokens of the answers, and of the prompts (once per pair)."""
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
