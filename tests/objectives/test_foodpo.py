"""FooDPO: a strength for every prompt; by hand, batched, padded, and as the original computes it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from support.hand_pairs import HAND, HANDS, RUN, SOURCES, Hand, loss_of, metrics_of
from support.tiny_models import VOCABULARY, random_pairs
from support.toy_backend import ENGINES

from macft.data.batches import collate
from macft.data.tokenization.table import Reference
from macft.objectives.batch import NumpyBatch
from macft.objectives.preference import Preference, PromptBeta


def test_foodpo_logs_beta_and_perplexity():
    flat = Hand([], [-1.0], [-2.0])
    metrics = metrics_of(Preference(beta=0.1, prompt_beta=PromptBeta(0.25, "policy")), HAND, flat)
    # 0.1 * 0.25 * 2; a prompt of one token takes pref_beta and has perplexity 1
    assert metrics["dynamic_beta"] == pytest.approx(0.05 + 0.1, rel=1e-12)
    assert metrics["log_prompt_perplexity"] == pytest.approx(2.0, rel=1e-12)
    assert metrics["prompt_perplexity"] == pytest.approx(math.e**2 + 1, rel=1e-12)
    assert metrics["rewards/chosen"] == pytest.approx(0.05 * 1 + 0.1 * 3, rel=1e-12)


@pytest.mark.parametrize("source", ["reference", "policy", "policy_with_gradient"])
def test_a_prompt_of_one_token_takes_pref_beta(source):
    flat = Hand([], [-1.0, -2.0], [-3.0], (-4.0, -1.0, 0.0))
    # clamps are for the prompt's own beta
    objective = Preference(beta=0.3, prompt_beta=PromptBeta(0.5, source, low=0.5, high=0.6))
    assert loss_of(objective, flat) == loss_of(Preference(beta=0.3), flat)


@pytest.mark.parametrize(("low", "high", "beta"), [(None, None, 0.1), (0.2, None, 0.2), (None, 0.05, 0.05)])
def test_clamps_bound_beta(low, high, beta):
    objective = Preference(beta=0.1, prompt_beta=PromptBeta(0.5, "policy", low, high))
    assert metrics_of(objective, HAND)["dynamic_beta"] == pytest.approx(beta, rel=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_only_policy_with_gradient_reaches_the_prompt(engine):
    gradients = {
        source: RUN[engine](Preference(prompt_beta=SOURCES[source]), HANDS[:1]).gradient[0, :2]
        for source in ("reference", "policy", "policy_with_gradient")
    }
    np.testing.assert_array_equal(gradients["reference"], 0)
    np.testing.assert_array_equal(gradients["policy"], 0)
    # dL/dbeta = -s(-beta delta) delta, dbeta/dlogp = -0.1 * 0.5 / 2; beta delta = 0.2
    np.testing.assert_allclose(gradients["policy_with_gradient"], 2 * 0.025 / (1 + math.exp(0.2)), rtol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("source", SOURCES)
def test_a_batch_is_the_sum_of_its_pairs_and_padding_counts_for_nothing(source, engine):
    objective = Preference(beta=0.4, prompt_beta=SOURCES[source])
    whole, padded = (RUN[engine](objective, HANDS, extra) for extra in (0, 7))
    singles = [RUN[engine](objective, [hand]) for hand in HANDS]
    assert padded.loss == pytest.approx(whole.loss, rel=1e-6)
    assert padded.metrics == pytest.approx(whole.metrics, rel=1e-6)
    np.testing.assert_allclose(padded.gradient[:, :-7], whole.gradient, rtol=1e-6, atol=0)
    np.testing.assert_array_equal(padded.gradient[:, -7:], 0)
    assert sum(single.loss for single in singles) == pytest.approx(whole.loss, rel=1e-6)
    for i, single in enumerate(singles):
        width = single.gradient.shape[1]
        np.testing.assert_allclose(single.gradient, whole.gradient[i :: len(singles), :width], rtol=1e-6, atol=0)


# The original, at batch 1


def original(logits, tokens, labels, lengths, reference, *, beta: float, scale: float):
    """The original's loss of one pair, row 0 chosen; its perplexity counts real tokens alone, whatever their ids.

    logits float64 [2, T, V], labels -100 where a token is not of the answer, reference log-probabilities [2].
    """
    import torch

    logps = torch.log_softmax(logits, dim=-1)[:, :-1].gather(2, tokens[:, 1:, None])[:, :, 0]
    answer = labels[:, 1:] != -100
    real = torch.arange(1, tokens.shape[1]) < lengths[:, None]
    prompt = logps[0][~answer[0] & real[0]]
    perplexity = torch.exp(-prompt.mean())
    dynamic_beta = scale * torch.log(torch.clamp(perplexity, min=1.0)) * beta
    ratios = (logps * answer).sum(dim=1) - reference
    return -torch.nn.functional.logsigmoid(dynamic_beta * (ratios[0] - ratios[1])), dynamic_beta


@pytest.mark.torch
@pytest.mark.parametrize("engine", ENGINES)
def test_policy_with_gradient_is_the_original(engine):
    """Loss, beta, and the gradient by every logit, prompt included; token id 0 and padding are in play."""
    import torch

    [pair] = random_pairs(1, seed=5, prompt=(9, 9), answer=(3, 12))
    pair.chosen.tokens[4] = pair.rejected.tokens[4] = 0
    # such logits cost about 5.8 a token: the margin stays small
    chosen, rejected = (-5.8 * row.loss_mask.sum() for row in (pair.chosen, pair.rejected))
    batch = collate([replace(pair, reference=Reference(chosen - 2, rejected, math.nan))])
    assert batch.lengths[0] < batch.lengths[1], "the chosen row is to be padded"
    logits = np.random.default_rng(0).normal(size=(*batch.tokens.shape, VOCABULARY))
    leaf = torch.tensor(logits, requires_grad=True)
    tokens = torch.from_numpy(batch.tokens).long()
    labels = torch.where(torch.from_numpy(batch.loss_mask), tokens, -100)
    reference = torch.from_numpy(batch.reference_logps)
    theirs, beta = original(leaf, tokens, labels, torch.from_numpy(batch.lengths), reference, beta=0.3, scale=0.5)
    theirs.backward()

    ours = Preference(beta=0.3, prompt_beta=PromptBeta(0.5, "policy_with_gradient"))
    loss, metrics, gradient = LOSS_OF_LOGITS[engine](ours, logits, batch)
    assert metrics["dynamic_beta"] == pytest.approx(beta.item(), rel=1e-5)
    assert loss == pytest.approx(theirs.item(), rel=1e-5)
    expected = leaf.grad.numpy()
    assert np.abs(gradient - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(expected[0, : pair.prompt_length - 1]).max() > 0.01 * np.abs(expected).max()
    _, _, stopped = LOSS_OF_LOGITS[engine](replace(ours, prompt_beta=PromptBeta(0.5, "policy")), logits, batch)
    assert np.abs(stopped - expected).max() > 1e-2 * np.abs(expected).max()


def mlx_loss_of_logits(objective: Preference, logits: np.ndarray, batch: NumpyBatch):
    import mlx.core as mx

    from macft.backends.mlx.ops import MlxOps, cross_entropy

    def run(values: mx.array):
        targets = mx.array(batch.tokens[:, 1:]).reshape(-1)
        logps = -cross_entropy(values[:, :-1].reshape(len(targets), -1), targets)
        return objective(MlxOps(), logps.reshape(len(batch.tokens), -1), batch.map(mx.array))

    (loss, metrics), gradient = mx.value_and_grad(run)(mx.array(logits.astype(np.float32)))
    return loss.item(), {name: value.item() for name, value in metrics.items()}, np.array(gradient)


def torch_loss_of_logits(objective: Preference, logits: np.ndarray, batch: NumpyBatch):
    import torch

    from macft.backends.torch.ops import TorchOps

    values = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    targets = torch.from_numpy(batch.tokens[:, 1:]).long()
    logps = -torch.nn.functional.cross_entropy(values[:, :-1].transpose(1, 2), targets, reduction="none")
    loss, metrics = objective(TorchOps(), logps, batch.map(torch.from_numpy))
    loss.backward()
    return loss.item(), {name: value.item() for name, value in metrics.items()}, values.grad.numpy()


LOSS_OF_LOGITS = {"mlx": mlx_loss_of_logits, "torch": torch_loss_of_logits}
