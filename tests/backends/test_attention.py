"""Attention by other kernels: packed rows by a stand-in for the GPU's, and key heads repeated for older cards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.engines import load_model, train_step
from support.tiny_models import WINDOW, random_examples

from macft.backends.base import LoraSpec, ModelSpec, OptimizerSpec, State, StepResult
from macft.backends.torch import attention, backend, split
from macft.backends.torch import model as models
from macft.data.batches import collate
from macft.data.tokenization.packing import PackedExample
from macft.objectives.losses import Sft

pytestmark = pytest.mark.usefixtures("small_threads")

# With beta1 = 0 the first moment is the gradient.
GRADIENT = OptimizerSpec(beta1=0.0, max_grad_norm=0.0)


def test_the_bounds_of_examples_are_those_counted_by_hand():
    positions = np.array([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1]])
    bounds, longest = attention.segment_bounds(positions)
    assert bounds.tolist() == [0, 3, 4, 6, 10, 12] and bounds.dtype == np.int32 and longest == 4


@pytest.fixture
def kernel(monkeypatch) -> list[tuple[int, int]]:
    """Plain attention over one segment after the other, as the kernel's documentation has it; lists the windows."""
    windows = []

    def attend(query, key, value, starts, starts_k, longest, longest_k, *, scale, window_size, enable_gqa):
        assert starts is starts_k and longest == longest_k == int(starts.diff().max())
        windows.append(window_size)
        assert enable_gqa == (query.shape[1] != key.shape[1])
        parts = []
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
            back = torch.arange(end - start)[:, None] - torch.arange(end - start)
            seen = (back >= 0) & ((back <= window_size[0]) if window_size[0] >= 0 else True)
            weights = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(dim=-1)
            parts.append((weights @ v).transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(attention, "varlen_attn", attend)
    monkeypatch.setattr(split, "has_varlen", lambda *_: True)
    return windows


def step(folder, **options) -> tuple[backend.TorchModel, StepResult, State]:
    spec = ModelSpec(folder, LoraSpec(4, 8), precision="float32", packing=True, **options)
    model = load_model("torch", spec, GRADIENT)
    # one row of three examples and one of two, so that there is padding
    examples = random_examples(5, seed=4)
    batch = collate([PackedExample(tuple(examples[:3])), PackedExample(tuple(examples[3:]))])
    result = train_step(model, Sft(), [batch], lr=0.0, step=0)
    return model, result, model.optimizer_state()


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
def test_the_kernel_gives_the_gradients_of_masked_attention(architecture, checkpoints, tiny_model, kernel, monkeypatch):
    model, result, state = step(tiny_model(architecture), gradient_checkpointing=checkpoints)
    assert model._split.uses_varlen
    assert set(kernel) == ({(-1, 0), (WINDOW - 1, 0)} if architecture == "gemma3_text" else {(-1, 0)})
    calls = len(kernel)
    monkeypatch.setattr(split, "has_varlen", lambda *_: False)
    _, expected, expected_state = step(tiny_model(architecture), gradient_checkpointing=checkpoints)
    assert len(kernel) == calls, "masked attention was computed by itself"
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, value in expected_state.items():
        np.testing.assert_allclose(state[name], value, atol=1e-5 * np.abs(value).max(), err_msg=name)


@pytest.mark.usefixtures("kernel")
def test_a_kernel_that_gives_other_logits_is_not_used(tiny_model, monkeypatch):
    real = attention.varlen_attn
    monkeypatch.setattr(attention, "varlen_attn", lambda *args, **options: 1.01 * real(*args, **options))
    model, _, _ = step(tiny_model("llama"))
    assert model._split.packs and not model._split.uses_varlen
    assert model._model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("capability", "version", "dtype", "expected"),
    [
        ((7, 5), "2.13.0+cu130", torch.float16, True),
        ((8, 6), "2.13.0+cu130", torch.bfloat16, False),
        ((8, 6), "2.13.0+cu130", torch.float32, True),
        ((7, 5), "2.14.1", torch.float16, False),
    ],
)
def test_key_heads_are_repeated_where_grouped_ones_would_keep_whole_score_matrices(
    capability, version, dtype, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch, "__version__", version)
    assert attention.needs_repeated_heads(torch.device("cuda"), dtype) is expected
    assert attention.needs_repeated_heads(torch.device("cpu"), dtype) is False


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_repeated_key_heads_give_the_numbers_of_grouped_ones(architecture, tiny_model, monkeypatch):
    _, expected, state = step(tiny_model(architecture))
    monkeypatch.setattr(models, "needs_repeated_heads", lambda *_: True)
    calls = []
    real = attention.sdpa_attention_forward
    monkeypatch.setattr(
        attention,
        "sdpa_attention_forward",
        lambda module, query, key, *rest, **options: (
            calls.append(key.shape[1] == query.shape[1]) or real(module, query, key, *rest, **options)
        ),
    )
    model, result, repeated = step(tiny_model(architecture))
    assert calls and all(calls) and model._split.packs and model._split.splits
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    for name, value in state.items():
        np.testing.assert_allclose(repeated[name], value, atol=1e-5 * np.abs(value).max(), err_msg=name)
