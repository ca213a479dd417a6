"""Train on the same rows from the same adapter with a trainer of TRL and with macft, and compare the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from macft.backends.base import LoraSpec, Model, ModelSpec, OptimizerSpec, State
from macft.data.batches import collate
from macft.objectives.losses import Objective
from macft.weights.adapters.peft import AdapterConfig, write_adapter
from support.engines import load_model, train_step
from support.tiny_models import VOCABULARY

STEPS = 10
EOS = 2
# a large epsilon, so that its place in the formula shows; a norm that most steps exceed, and some of ld_alpha do not
OPTIMIZER = OptimizerSpec(beta1=0.9, beta2=0.98, epsilon=1e-4, weight_decay=0.1, max_grad_norm=1.5)


@dataclass(frozen=True)
class Job:
    """What both trainers are given."""

    folder: Path
    lora: LoraSpec
    rows: list[Any]
    ids: list[tuple[list[int], ...]]  # of each row, in the order of the columns
    batch_size: int
    lr: float
    state: State  # the starting adapter
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A trainer of TRL: its name, the columns of token ids that it makes, the curves to compare."""

    name: str
    columns: tuple[str, ...]
    curves: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What a trainer did: one value a step of every curve, and the adapter it ended with."""

    curves: dict[str, np.ndarray]
    state: State


def prepare(
    folder: Path,
    lora: LoraSpec,
    rows: list[Any],
    ids: list[tuple[list[int], ...]],
    *,
    fresh: bool,
    batch_size: int,
    lr: float,
) -> Job:
    """A job from a fresh adapter (B is 0), or from one that already changes the model."""
    model = load_model("torch", ModelSpec(folder=folder, lora=lora, precision="float32", seed=3))
    rng = np.random.default_rng(5)
    state = {
        name: value if "lora_A" in name or fresh else rng.normal(0, 0.01, value.shape).astype(np.float32)
        for name, value in sorted(model.trained_state().items())
    }
    return Job(folder, lora, rows, ids, batch_size, lr, state, model.info.target_modules)


def run_macft(engine: str, job: Job, objective: Objective, score: Callable[[Model, list[Any]], list[Any]]) -> Run:
    """References of all batches before training, by `score`, then the steps."""
    model = load_model(engine, ModelSpec(folder=job.folder, lora=job.lora, precision="float32"), OPTIMIZER)
    model.set_trained_state(job.state)
    batches = [job.rows[i : i + job.batch_size] for i in range(0, len(job.rows), job.batch_size)]
    curves: dict[str, list[float]] = {}
    for step, rows in enumerate([score(model, rows) for rows in batches]):
        batch = objective.complete(collate(rows), model.logps)
        result = train_step(model, objective, [batch], lr=job.lr, step=step)
        for name, value in {"loss": result.loss, **objective.report(result.metrics)}.items():
            curves.setdefault(name, []).append(value)
    return Run({name: np.array(values) for name, values in curves.items()}, model.trained_state())


def run_trl(
    kind: Kind, job: Job, output: Path, rows: list[dict], tokenizer, settings: dict, *, fresh: bool = False
) -> Run:
    """A trainer as it is, on rows that it tokenizes itself; its tokens must be those of the job.

    A `fresh` adapter is TRL's to make, and its reference the model with the adapter switched off. Of an
    adapter that was loaded TRL keeps a frozen copy for reference.
    """
    import trl
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    make_config, make_trainer = getattr(trl, f"{kind.name}Config"), getattr(trl, f"{kind.name}Trainer")

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
    config = make_config(
        output_dir=str(output), per_device_train_batch_size=job.batch_size, max_steps=STEPS, learning_rate=job.lr,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None,
        adam_beta1=OPTIMIZER.beta1, adam_beta2=OPTIMIZER.beta2, adam_epsilon=OPTIMIZER.epsilon,
        weight_decay=OPTIMIZER.weight_decay, max_grad_norm=OPTIMIZER.max_grad_norm, **settings,
    )  # fmt: skip
    trainer = make_trainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora if fresh else None,
    )
    assert [tuple(row[name] for name in kind.columns) for row in trainer.train_dataset] == job.ids
    assert ("ref" in trainer.model.peft_config) == (not fresh)
    if fresh:
        set_peft_model_state_dict(trainer.model, {name: torch.from_numpy(a) for name, a in job.state.items()})
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == STEPS
    state = get_peft_model_state_dict(trainer.model)
    return Run(
        {name: np.array([entry[name] for entry in logs]) for name in kind.curves},
        {name: value.detach().numpy().copy() for name, value in state.items()},
    )


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
