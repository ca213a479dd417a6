"""Compute KTO (arXiv 2402.01306) over answers rated desirable or not.

S is the log-probability of an answer, A its mean over the tokens, ref S the reference's, s(x) = 1 / (1 + e^-x). With
r = S - ref S and z the KL term, an answer costs chosen_weight (1 - s(beta (r - z))) if it is desirable, else
rejected_weight (1 - s(beta (z - r))).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from macft.errors import MacftError
from macft.objectives.batch import Batch, NumpyBatch
from macft.objectives.losses import Objective, Score
from macft.objectives.ops import Array, NumpyOps, Ops
from macft.objectives.preference_losses import one_minus_sigmoid


@dataclass(frozen=True)
class Kto(Objective):
    """The loss above, with `ftx` times the SFT loss of desirable answers added."""

    beta: float = 0.1
    chosen_weight: float = 1.0
    rejected_weight: float = 1.0
    ftx: float = 0.0

    def start_loss(self, share: float) -> float:
        """The loss, without its SFT part, of a policy that is its own reference; `share` of the answers desirable."""
        return (share * self.chosen_weight + (1.0 - share) * self.rejected_weight) / 2.0

    def complete(self, batch: NumpyBatch, score: Score) -> NumpyBatch:
        """Replace the mismatched answers by z = max(0, mean over them of S - ref S).

        Raises MacftError if the batch has no reference.
        """
        if batch.reference_logps is None:
            raise MacftError(
                "stage kto needs the reference's log-probabilities, and the batch has none; score the answers with it"
            )
        assert batch.desirable is not None, "KTO takes rated answers"
        count = len(batch.desirable)
        answers, mismatched = _part(batch, slice(count)), _part(batch, slice(count, None))
        positions = self.positions(mismatched)
        scores, _ = answer_scores(NumpyOps(), score(mismatched, positions), mismatched)
        kl = max(0.0, float(np.mean(scores - mismatched.reference_logps)))
        return replace(answers, desirable=batch.desirable, kl=np.full(count, kl, dtype=np.float32))

    def weight(self, batch: NumpyBatch) -> float:
        """Answers in the batch."""
        return float(len(batch.tokens))

    def positions(self, batch: NumpyBatch) -> np.ndarray:
        """The answers."""
        return batch.loss_mask[:, 1:]

    def __call__(self, ops: Ops, logps: Array, batch: Batch[Array]) -> tuple[Array, dict[str, Array]]:
        """Sum over answers of loss + ftx * (-A of the desirable), and the sums of the metrics."""
        assert batch.kl is not None and batch.desirable is not None, "the batch is not completed"
        chosen = batch.desirable * 1.0
        rejected = 1.0 - chosen
        scores, tokens = answer_scores(ops, logps, batch)
        ratios = scores - batch.reference_logps
        gain = (chosen - rejected) * (ratios - batch.kl)
        weights = self.chosen_weight * chosen + self.rejected_weight * rejected
        losses = weights * one_minus_sigmoid(ops, self.beta * gain)
        rewards = self.beta * ratios
        metrics = {
            "share/chosen": chosen,
            "share/rejected": rejected,
            "rewards/chosen": chosen * rewards,
            "rewards/rejected": rejected * rewards,
            "logps/chosen": chosen * scores,
            "logps/rejected": rejected * scores,
            "kl": batch.kl,
        }
        if self.ftx > 0:
            metrics["sft_loss"] = -chosen * scores / tokens
            losses = losses + self.ftx * metrics["sft_loss"]
        return ops.sum(losses), {name: ops.sum(value) for name, value in metrics.items()}

    def report(self, metrics: dict[str, float]) -> dict[str, float]:
        """Means over the answers that a metric covers, without metrics of none and without the second share."""
        shares = {side: metrics[f"share/{side}"] for side in ("chosen", "rejected")}
        found = {"share/chosen": shares["chosen"]}
        for name, value in metrics.items():
            side = "chosen" if name == "sft_loss" else name.rpartition("/")[2]
            share = shares.get(side, 1.0)
            if share > 0 and not name.startswith("share/"):
                found[name] = value / share
        if {"rewards/chosen", "rewards/rejected"} <= found.keys():
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


def answer_scores(ops: Ops, logps: Array, batch: Batch[Array]) -> tuple[Array, Array]:
    """(S, tokens) of each answer."""
    mask = batch.loss_mask[:, 1:]
    return ops.row_sum(logps * mask), ops.row_sum(mask)


def _part(batch: NumpyBatch, rows: slice) -> NumpyBatch:
    """Some rows, without padding that only the others need."""
    lengths = batch.lengths[rows]
    width = int(lengths.max())
    assert batch.reference_logps is not None
    return Batch(
        tokens=batch.tokens[rows, :width],
        loss_mask=batch.loss_mask[rows, :width],
        lengths=lengths,
        reference_logps=batch.reference_logps[rows],
    )
