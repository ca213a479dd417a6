"""Write pairs down by their log-probabilities, and evaluate objectives over them on each array library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from macft.data.batches import collate
from macft.data.tokenization.table import Reference, TokenizedExample, TokenizedPair
from macft.objectives.batch import NumpyBatch
from macft.objectives.ops import NumpyOps
from macft.objectives.preference import Preference, PromptBeta

# stands where no objective may look: padding, and the prompts of rejected rows
JUNK = -77.0


@dataclass(frozen=True)
class Hand:
    """One pair by its log-probabilities; `prompt` lacks the first token, which nothing predicts."""

    prompt: Sequence[float]
    chosen: Sequence[float]
    rejected: Sequence[float]
    reference: tuple[float, float, float] | None = (-4.0, -7.0, 1.0)  # S_c, S_r, log PPL(prompt)


# S_c = -3, S_r = -8, delta = (-3 + 4) - (-8 + 7) = 2; A_c = -3/2, A_r = -2; log PPL = 2
HAND = Hand(prompt=[-3.0, -1.0], chosen=[-1.0, -2.0], rejected=[-1.0, -2.0, -2.0, -3.0])


def build(hands: Sequence[Hand], extra: int = 0) -> tuple[np.ndarray, NumpyBatch]:
    """(logps float64 [rows, T-1], batch) of pairs, with `extra` columns of padding."""
    rows = [(hand.prompt, hand.chosen) for hand in hands] + [
        ([JUNK] * len(hand.prompt), hand.rejected) for hand in hands
    ]
    examples = []
    for prompt, answer in rows:
        start, length = len(prompt) + 1, len(prompt) + 1 + len(answer)
        examples.append(TokenizedExample(np.arange(length, dtype=np.int32), np.arange(length) >= start))
    pairs = [
        TokenizedPair(chosen, rejected, len(hand.prompt) + 1, hand.reference and Reference(*hand.reference))
        for hand, chosen, rejected in zip(hands, examples, examples[len(hands) :], strict=False)
    ]
    batch = collate(pairs)
    pad = ((0, 0), (0, extra))
    masks = {name: np.pad(getattr(batch, name), pad) for name in ("tokens", "loss_mask", "prompt_mask")}
    logps = np.full((len(rows), batch.tokens.shape[1] - 1 + extra), JUNK)
    for row, (prompt, answer) in zip(logps, rows, strict=True):
        row[: len(prompt) + len(answer)] = [*prompt, *answer]
    return logps, replace(batch, **masks)


@dataclass(frozen=True)
class Result:
    loss: float
    metrics: dict[str, float]
    gradient: np.ndarray | None = None  # d loss / d logps


def on_numpy(objective: Preference, hands: Sequence[Hand], extra: int = 0) -> Result:
    loss, metrics = objective(NumpyOps(), *build(hands, extra))
    return Result(float(loss), {name: float(value) for name, value in metrics.items()})


def on_mlx(objective: Preference, hands: Sequence[Hand], extra: int = 0) -> Result:
    import mlx.core as mx

    from macft.backends.mlx.ops import MlxOps

    logps, batch = build(hands, extra)

    def run(values: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        return objective(MlxOps(), values, batch.map(mx.array))

    (loss, metrics), gradient = mx.value_and_grad(run)(mx.array(logps.astype(np.float32)))
    return Result(loss.item(), {name: value.item() for name, value in metrics.items()}, np.array(gradient))


def on_torch(objective: Preference, hands: Sequence[Hand], extra: int = 0) -> Result:
    import torch

    from macft.backends.torch.ops import TorchOps

    logps, batch = build(hands, extra)
    values = torch.tensor(logps, dtype=torch.float32, requires_grad=True)
    loss, metrics = objective(TorchOps(), values, batch.map(torch.from_numpy))
    loss.backward()
    return Result(loss.item(), {name: value.item() for name, value in metrics.items()}, values.grad.numpy())


RUN: dict[str, Callable[..., Result]] = {"mlx": on_mlx, "torch": on_torch}


def loss_of(objective: Preference, *hands: Hand) -> float:
    """On NumPy."""
    return on_numpy(objective, hands).loss


def metrics_of(objective: Preference, *hands: Hand) -> dict[str, float]:
    """On NumPy."""
    return on_numpy(objective, hands).metrics


# log PPL 2, none, 2, 6 and 0.15; answers of equal and unequal lengths
HANDS = (
    HAND,
    Hand([], [-0.5, -0.25, -1.5], [-2.0], (-1.0, -1.5, 0.0)),
    Hand([-0.5, -2.0, -4.0, -1.5], [-0.75], [-0.5, -0.125, -3.0, -0.5, -1.0], (-1.0, -6.0, 3.0)),
    Hand([-6.0], [-2.0, -1.0], [-3.0, -0.5], (-2.0, -4.0, 8.0)),
    Hand([-0.1, -0.2], [-0.01, -0.02, -0.04], [-2.0, -0.5, -1.0, -2.5], (-0.5, -5.0, 0.25)),
)
SOURCES: dict[str, PromptBeta | None] = {
    "dpo": None,
    "reference": PromptBeta(0.5),
    "policy": PromptBeta(0.5, "policy"),
    "policy_with_gradient": PromptBeta(0.5, "policy_with_gradient"),
    "clamped": PromptBeta(0.5, "policy_with_gradient", low=0.2, high=0.35),
}
