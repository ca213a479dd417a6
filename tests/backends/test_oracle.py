"""Loss and gradients against a plain transformers and PEFT computation, and what must not change them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.engines import load_model, train_step
from support.paths import CHECKOUT
from support.tiny_models import ARCHITECTURES, VOCABULARY, random_examples

from macft.backends.base import LoraSpec, Model, ModelSpec, OptimizerSpec, State
from macft.data.batches import collate
from macft.data.tokenization.table import TokenizedExample
from macft.engines import BACKENDS
from macft.objectives.batch import Batch, NumpyBatch
from macft.objectives.losses import Sft
from macft.objectives.ops import NumpyOps

pytestmark = [pytest.mark.mlx, pytest.mark.torch]

ENGINES = tuple(BACKENDS)
LORA = LoraSpec(rank=4, alpha=8)
# Adam's first moment after one step is (1 - beta1) x gradient: the gradient without asking for it
BETA1 = 0.9
NO_CLIPPING = OptimizerSpec(beta1=BETA1, max_grad_norm=0.0)


def load(engine: str, folder: Path, lora: LoraSpec = LORA) -> Model:
    """A backend whose adapter has a random B: with B = 0, A has no gradient and half goes untested."""
    backend = load_model(engine, ModelSpec(folder=folder, lora=lora, precision="float32"), NO_CLIPPING)
    backend.set_trained_state(random_adapter(backend.trained_state()))
    return backend


def random_adapter(state: State) -> State:
    """The same names and shapes, A kept, B and DoRA magnitudes random."""
    rng = np.random.default_rng(5)
    return {
        name: value if "lora_A" in name else (value + rng.normal(0, 0.1, value.shape)).astype(np.float32)
        for name, value in sorted(state.items())
    }


def gradients(backend: Model, batches: list[NumpyBatch]) -> tuple[float, State]:
    """Loss and gradients of one step."""
    result = train_step(backend, Sft(), batches, lr=0.0, step=0)
    moments = backend.optimizer_state()
    return result.loss, {
        name.removesuffix(".exp_avg"): value / (1 - BETA1)
        for name, value in moments.items()
        if name.endswith(".exp_avg")
    }


def plain_gradients(
    folder: Path, state: State, examples: list[TokenizedExample], lora: LoraSpec, targets: list[str]
) -> tuple[float, State]:
    """Row by row, all logits, labels with -100: nothing of macft in it."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, use_dora=lora.use_dora, use_rslora=lora.use_rslora
    )
    model = get_peft_model(model, config)
    set_peft_model_state_dict(model, {name: torch.from_numpy(value) for name, value in state.items()})
    total, count = torch.tensor(0.0), 0
    for example in examples:
        tokens = torch.from_numpy(example.tokens).long()[None]
        labels = torch.where(torch.from_numpy(example.loss_mask), tokens[0], torch.tensor(-100))
        logits = model(input_ids=tokens).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
    loss = total / count
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name.replace(".default", "").replace("vector.weight", "vector")] = parameter.grad.numpy()
    return loss.item(), found


def largest_error(found: State, expected: State) -> float:
    """Largest difference, relative to the largest entry of each tensor's gradient."""
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in expected)


KINDS = {"lora": LORA, "dora": LoraSpec(rank=4, alpha=8, use_dora=True), "rslora": LoraSpec(4, 8, use_rslora=True)}


# every architecture with LoRA; every kind of adapter on the architecture that has biases
CASES = [(architecture, "lora") for architecture in ARCHITECTURES] + [("qwen2", "dora"), ("qwen2", "rslora")]


@pytest.mark.parametrize(("architecture", "kind"), CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_first_step_equals_plain_transformers_and_peft(engine, architecture, kind, tiny_model):
    folder, lora = tiny_model(architecture), KINDS[kind]
    examples = random_examples(5, seed=1)
    backend = load(engine, folder, lora)
    targets = sorted({name.split(".")[-3] for name in backend.trained_state() if "lora_A" in name})
    wanted_loss, expected = plain_gradients(folder, backend.trained_state(), examples, lora, targets)
    loss, found = gradients(backend, [collate(examples[:3]), collate(examples[3:])])
    assert loss == pytest.approx(wanted_loss, rel=2e-6)
    # float32 sums in another order; the largest seen is 3e-5
    assert largest_error(found, expected) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_padding_composition_and_order_do_not_change_loss_and_gradients(engine, tiny_model):
    examples = random_examples(6, seed=2)
    layouts = {
        "one batch": [collate(examples)],
        "reversed": [collate(examples[::-1])],
        "one row at a time": [collate([example]) for example in examples],
        "padded further": [padded(collate(examples), 17)],
    }
    results = {name: gradients(load(engine, tiny_model("gemma3_text")), batches) for name, batches in layouts.items()}
    loss, expected = results.pop("one batch")
    for name, (other_loss, found) in results.items():
        assert other_loss == pytest.approx(loss, rel=1e-6), name
        assert largest_error(found, expected) < 1e-4, name


def padded(batch: NumpyBatch, columns: int) -> NumpyBatch:
    """More padding on the right, of a token that is not 0: its value must not matter."""
    tokens = np.pad(batch.tokens, ((0, 0), (0, columns)), constant_values=VOCABULARY - 1)
    return Batch(tokens=tokens, loss_mask=np.pad(batch.loss_mask, ((0, 0), (0, columns))), lengths=batch.lengths)


@pytest.mark.parametrize("engine", ENGINES)
def test_logps_are_those_of_the_full_softmax(engine, tiny_model):
    from transformers import AutoModelForCausalLM

    folder = tiny_model("qwen3")
    batch = collate(random_examples(4, seed=4))
    backend = load_model(engine, ModelSpec(folder=folder, lora=None, precision="float32"))
    found = backend.logps(batch, Sft().positions(batch))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.from_numpy(batch.tokens).long()
    with torch.no_grad():
        table = torch.log_softmax(model(input_ids=tokens).logits[:, :-1], dim=-1)
    expected = torch.gather(table, 2, tokens[:, 1:, None])[..., 0].numpy()
    mask = batch.loss_mask[:, 1:]
    np.testing.assert_allclose(found[mask], expected[mask], rtol=2e-5, atol=2e-5)
    assert not found[~mask].any()
    loss, _ = Sft()(NumpyOps(), found, batch)
    assert loss / Sft().weight(batch) == pytest.approx(-expected[mask].mean(), rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_head_sees_trained_positions_only(engine, tiny_model):
    """The work saved is plural, not timed: rows that reach the output layer."""
    batch = collate(random_examples(4, seed=4))
    backend = load_model(engine, ModelSpec(folder=tiny_model("qwen2"), lora=LORA, precision="float32"), NO_CLIPPING)
    rows: list[int] = []
    count_head_rows(engine, backend, rows)
    train_step(backend, Sft(), [batch], lr=0.0, step=0)
    assert rows == [int(batch.loss_mask[:, 1:].sum())]
    assert rows[0] < batch.tokens.size / 2


def count_head_rows(engine: str, backend, rows: list[int]) -> None:
    """Note how many rows each call of the output layer gets."""
    if engine == "torch":
        head = backend._model.get_output_embeddings()
        head.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0][..., 0].numel()))
        return
    head = backend._model.lm_head

    def counting(x):
        rows.append(x[..., 0].size)
        return head(x)

    object.__setattr__(backend._model, "lm_head", counting)


def test_a_model_whose_logits_would_differ_keeps_the_full_path(tiny_model, monkeypatch):
    """A head that looks at neighboring positions cannot work on gathered rows; loading finds out."""
    import mlx.core as mx
    from mlx_lm.models import llama

    original = llama.Model.__call__

    def shifted(self, inputs, cache=None, input_embeddings=None):
        return mx.cumsum(original(self, inputs, cache, input_embeddings), axis=1)

    monkeypatch.setattr(llama.Model, "__call__", shifted)
    loaded = load_model("mlx", ModelSpec(folder=tiny_model("llama"), lora=LORA, precision="float32"), NO_CLIPPING)
    assert any("every position" in note for note in loaded.info.notes)


@pytest.mark.slow
def test_smollm2_gives_one_curve_on_both_engines_for_10_steps():
    from support.data_rows import read_examples, tokenize_examples

    from macft.data.templates.chat_template import load_template
    from macft.data.tokenization.tokenizer import load_tokenizer
    from macft.models.locate import resolve_model

    folder = resolve_model("smollm2-135m").path
    tokenizer = load_tokenizer(folder)
    rows = read_examples(str(CHECKOUT / "data" / "quickstart.jsonl"), "data", 20)
    template = load_template(folder, tokenizer.special_map)
    examples, _ = tokenize_examples(rows, tokenizer, template, cutoff_len=256)
    curves = {}
    for engine in ENGINES:
        spec = ModelSpec(folder=folder, lora=LoraSpec(rank=8, alpha=16), precision="float32")
        backend = load_model(engine, spec, OptimizerSpec(weight_decay=0.1))
        results = [
            train_step(backend, Sft(), [collate(examples[i : i + 2])], lr=2e-4, step=i // 2) for i in range(0, 20, 2)
        ]
        curves[engine] = np.array([(result.loss, result.grad_norm) for result in results])
    np.testing.assert_allclose(curves["mlx"][:, 0], curves["torch"][:, 0], rtol=1e-5)
    # Against float64, PyTorch's own gradient norms here are off by up to 4e-5, MLX's by 5e-6.
    np.testing.assert_allclose(curves["mlx"][:, 1], curves["torch"][:, 1], rtol=5e-5)
    assert curves["mlx"][-1, 0] < curves["mlx"][0, 0]


def test_the_compiled_step_equals_the_eager_one(tiny_model, request):
    """On a GPU step and optimizer are compiled, and shapes are padded; none of it may change a number."""
    examples = random_examples(8, seed=6)
    curves = []
    for _ in range(2):
        backend = load("mlx", tiny_model("qwen2"))
        batches = [[collate(examples[i : i + 2]), collate(examples[i + 2 : i + 4])] for i in (0, 4)] * 2
        results = [train_step(backend, Sft(), pair, lr=1e-3, step=step) for step, pair in enumerate(batches)]
        curves.append([(result.loss, result.grad_norm) for result in results])
        request.getfixturevalue("mac")
    assert len(backend._steps[Sft()].shapes) == 3
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-6)
