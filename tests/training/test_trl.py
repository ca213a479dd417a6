"""Preference training against TRL's own DPOTrainer: the same rows from the same adapter, step by step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.paths import CHECKOUT
from support.tiny_models import VOCABULARY

from macft.backends import load_backend
from macft.backends.base import Backend, LoraSpec, ModelSpec, OptimizerSpec, State
from macft.data.batches import collate, row_length
from macft.data.formats.dataset import read_pairs
from macft.data.templates.chat_template import load_template
from macft.data.tokenization.conversations import TokenizedExample
from macft.data.tokenization.pairs import Reference, TokenizedPair, tokenize_pairs
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.models.locate import resolve_model
from macft.objectives.preference import Preference, answer_positions, reference_columns
from macft.weights.adapters.peft import AdapterConfig, write_adapter

pytest.importorskip("trl", reason="trl is not installed: pip install trl")

pytestmark = [pytest.mark.mlx, pytest.mark.torch]

ENGINES = ("mlx", "torch")
STEPS = 10
EOS = 2
# a large epsilon, so that its place in the formula shows; a norm that most steps exceed, and some of ld_alpha do not
OPTIMIZER = OptimizerSpec(beta1=0.9, beta2=0.98, epsilon=1e-4, weight_decay=0.1, max_grad_norm=1.5)
CURVES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")

# (macft's objective, TRL's settings)
LOSSES = {
    "sigmoid": (Preference(beta=0.5), {"loss_type": ["sigmoid"], "beta": 0.5}),
    "hinge": (Preference("hinge", beta=0.5), {"loss_type": ["hinge"], "beta": 0.5}),
    "ipo": (Preference("ipo", beta=0.1), {"loss_type": ["ipo"], "beta": 0.1}),
    "robust": (
        Preference("robust", beta=0.3, label_smoothing=0.1),
        {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.1},
    ),
    "apo_zero": (Preference("apo_zero", beta=0.5), {"loss_type": ["apo_zero"], "beta": 0.5}),
    "apo_down": (Preference("apo_down", beta=0.5), {"loss_type": ["apo_down"], "beta": 0.5}),
    "ld_alpha": (Preference(beta=0.1, ld_alpha=0.4), {"loss_type": ["sigmoid"], "beta": 0.1, "ld_alpha": 0.4}),
}


@dataclass(frozen=True)
class Job:
    """What both trainers are given."""

    folder: Path
    lora: LoraSpec
    pairs: list[TokenizedPair]
    batch_size: int
    lr: float
    state: State  # the starting adapter
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What a trainer did: one value a step of every curve, and the adapter it ended with."""

    curves: dict[str, np.ndarray]
    state: State


def prepare(
    folder: Path, lora: LoraSpec, pairs: list[TokenizedPair], *, fresh: bool, batch_size: int, lr: float
) -> Job:
    """A job from a fresh adapter (B is 0), or from one that already changes the model."""
    backend = load_backend("torch")
    loaded = backend.load(ModelSpec(folder=folder, lora=lora, precision="float32", seed=3))
    rng = np.random.default_rng(5)
    state = {
        name: value if "lora_A" in name or fresh else rng.normal(0, 0.01, value.shape).astype(np.float32)
        for name, value in sorted(backend.adapter_state().items())
    }
    return Job(folder, lora, pairs, batch_size, lr, state, loaded.target_modules)


def run_macft(engine: str, job: Job, objective: Preference) -> Run:
    """References once before training, then the steps."""
    backend: Backend = load_backend(engine)
    backend.load(ModelSpec(folder=job.folder, lora=job.lora, precision="float32"), OPTIMIZER)
    backend.set_adapter_state(job.state)
    batches = [job.pairs[i : i + job.batch_size] for i in range(0, len(job.pairs), job.batch_size)]
    curves: dict[str, list[float]] = {name: [] for name in CURVES}
    with_reference = []
    for pairs in batches:
        batch = collate(pairs)
        logps = backend.logps(batch, answer_positions(batch, with_prompt=True))
        columns = zip(*reference_columns(logps, batch, objective.ld_alpha), strict=True)
        with_reference.append(
            [replace(pair, reference=Reference(*values)) for pair, values in zip(pairs, columns, strict=True)]
        )
    for step, pairs in enumerate(with_reference):
        result = backend.train_step(objective, [collate(pairs)], lr=job.lr, step=step)
        for name in CURVES:
            curves[name].append(result.loss if name == "loss" else result.metrics[name])
    return Run({name: np.array(values) for name, values in curves.items()}, backend.adapter_state())


def run_trl(job: Job, output: Path, rows: list[dict], tokenizer, settings: dict, *, fresh: bool = False) -> Run:
    """DPOTrainer as it is, on rows that it tokenizes itself; its tokens must be those of the job.

    A `fresh` adapter is TRL's to make, and its reference the model with the adapter switched off. Of an
    adapter that was loaded TRL keeps a frozen copy for reference.
    """
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32)
    lora = LoraConfig(
        r=job.lora.rank, lora_alpha=job.lora.alpha, target_modules=list(job.targets), task_type="CAUSAL_LM"
    )
    if not fresh:
        config = AdapterConfig(str(job.folder), job.lora.rank, job.lora.alpha, 0.0, job.targets)
        adapter = output / "start"
        adapter.mkdir()
        write_adapter(adapter, config, job.state, "")
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    config = DPOConfig(
        output_dir=str(output), per_device_train_batch_size=job.batch_size, max_steps=STEPS, learning_rate=job.lr,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None,
        adam_beta1=OPTIMIZER.beta1, adam_beta2=OPTIMIZER.beta2, adam_epsilon=OPTIMIZER.epsilon,
        weight_decay=OPTIMIZER.weight_decay, max_grad_norm=OPTIMIZER.max_grad_norm, **settings,
    )  # fmt: skip
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora if fresh else None,
    )
    assert tokens_of(trainer.train_dataset) == [ids(pair) for pair in job.pairs]
    assert ("ref" in trainer.model.peft_config) == (not fresh)
    if fresh:
        set_peft_model_state_dict(trainer.model, {name: torch.from_numpy(a) for name, a in job.state.items()})
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == STEPS
    state = get_peft_model_state_dict(trainer.model)
    return Run(
        {name: np.array([entry[name] for entry in logs]) for name in CURVES},
        {name: value.detach().numpy().copy() for name, value in state.items()},
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_ten_steps_from_a_trained_adapter_are_those_of_trl(loss, tiny_model, tmp_path):
    objective, settings = LOSSES[loss]
    pairs = random_pairs(40)
    job = prepare(tiny_model("llama"), LoraSpec(4, 8), pairs, fresh=False, batch_size=4, lr=5e-3)
    expected = run_trl(job, tmp_path, as_words(pairs), word_tokenizer(), settings)
    assert_moved(job, expected)
    for engine in ENGINES:
        check(run_macft(engine, job, objective), expected)


def test_ten_steps_from_a_fresh_adapter_are_those_of_trl(tiny_model, tmp_path):
    objective, settings = LOSSES["sigmoid"]
    pairs = random_pairs(20)
    job = prepare(tiny_model("llama"), LoraSpec(4, 8), pairs, fresh=True, batch_size=2, lr=5e-3)
    expected = run_trl(job, tmp_path, as_words(pairs), word_tokenizer(), settings, fresh=True)
    assert_moved(job, expected)
    for engine in ENGINES:
        check(run_macft(engine, job, objective), expected)


@pytest.mark.slow
def test_ten_steps_of_smollm2_on_the_tokens_of_chat_rows_are_those_of_trl(tmp_path):
    from transformers import PreTrainedTokenizerFast

    objective, settings = LOSSES["sigmoid"]
    folder = resolve_model("smollm2-135m").path
    tokenizer = load_tokenizer(folder)
    examples = read_pairs(str(CHECKOUT / "data" / "quickstart_pairs.jsonl"), "data", None)
    template = load_template(folder, tokenizer.special_map)
    tokenized, _ = tokenize_pairs(examples, tokenizer, template, cutoff_len=4096)
    both = [(example, pair) for example, pair in zip(examples, tokenized, strict=True) if row_length(pair) <= 128]
    both = both[: 2 * STEPS]
    rows = [{"prompt": [*e.prompt], "chosen": [*e.chosen], "rejected": [*e.rejected]} for e, _ in both]
    job = prepare(folder, LoraSpec(8, 16), [pair for _, pair in both], fresh=False, batch_size=2, lr=2e-4)
    expected = run_trl(job, tmp_path, rows, PreTrainedTokenizerFast.from_pretrained(folder), settings)
    assert_moved(job, expected)
    for engine in ENGINES:
        check(run_macft(engine, job, objective), expected)


def ids(pair: TokenizedPair) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the prompt and of both answers."""
    chosen, rejected = pair.chosen.tokens.tolist(), pair.rejected.tokens.tolist()
    return chosen[: pair.prompt_length], chosen[pair.prompt_length :], rejected[pair.prompt_length :]


def tokens_of(dataset) -> list[tuple[list[int], list[int], list[int]]]:
    """The same of every row of a data set that TRL tokenized."""
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in dataset]


def check(found: Run, expected: Run) -> None:
    """Curves agree to 1e-4 of the largest value of their kind, every matrix of the adapter to 1e-4 of its norm.

    Not every value to 1e-4 of itself: a reward is a small difference of large numbers, and where the gradient
    of an entry cancels to nothing, Adam's first steps take its rounding at full length. Measured against TRL in
    double precision, single entries of TRL's own adapter in single precision are 1.4e-4 off.
    """
    for name, curve in expected.curves.items():
        kind = name.split("/")[0]
        largest = max(np.abs(values).max() for other, values in expected.curves.items() if other.startswith(kind))
        np.testing.assert_allclose(found.curves[name], curve, rtol=0, atol=1e-4 * largest, err_msg=name)
    assert found.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        assert np.linalg.norm(found.state[name] - value) < 1e-4 * np.linalg.norm(value), name


def assert_moved(job: Job, run: Run) -> None:
    """Ten steps left the start: the agreement is not that of standing still."""
    assert np.abs(run.curves["rewards/margins"]).max() > 1e-3
    assert all(np.abs(value - job.state[name]).max() > 3 * job.lr for name, value in run.state.items())


def random_pairs(count: int) -> list[TokenizedPair]:
    """Pairs of all shapes, each answer with its end token."""
    rng = np.random.default_rng(11)
    pairs = []
    for _ in range(count):
        prompt = rng.integers(3, VOCABULARY, rng.integers(1, 25))
        rows = []
        for _ in range(2):
            tokens = np.concatenate([prompt, rng.integers(3, VOCABULARY, rng.integers(1, 20)), [EOS]]).astype(np.int32)
            rows.append(TokenizedExample(tokens, np.arange(len(tokens)) >= len(prompt)))
        pairs.append(TokenizedPair(rows[0], rows[1], len(prompt)))
    return pairs


def as_words(pairs: list[TokenizedPair]) -> list[dict]:
    """Rows of text that the tokenizer below turns into the tokens of the pairs."""
    return [
        {"prompt": words(prompt) + " ", "chosen": words(chosen), "rejected": words(rejected)}
        for prompt, chosen, rejected in map(ids, pairs)
    ]


def words(tokens: list[int]) -> str:
    """One word a token, 7 is w007: the end token's word must be no part of another word."""
    return " ".join(map(word, tokens))


def word(token: int) -> str:
    """The word of a token."""
    return f"w{token:03}"


def word_tokenizer():
    """The tokenizer of such words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word(token): token for token in range(VOCABULARY)}, unk_token=word(1)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=word(EOS), pad_token=word(0))
