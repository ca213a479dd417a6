"""What every engine offers, whatever it is built on: one table, one way to load, the same refusals."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from support.engines import load_model, train_step
from support.tiny_models import random_examples
from support.toy_backend import ENGINES

from macft.backends.base import LoraSpec, ModelSpec, OptimizerSpec
from macft.config.settings import Settings
from macft.data.batches import collate
from macft.engines import BACKENDS
from macft.errors import ModelError
from macft.objectives.losses import Sft
from macft.process_group import ProcessGroup
from macft.training.checkpoint import Progress, save_checkpoint
from macft.training.log.report import Report, StepRecord


def test_the_values_of_backend_are_the_rows_of_the_table():
    assert get_args(Settings.model_fields["backend"].annotation) == ("auto", *BACKENDS)


@pytest.mark.parametrize("engine", ENGINES)
def test_logits_and_log_probabilities_of_a_model_agree(engine, tiny_model):
    model = load_model(engine, ModelSpec(tiny_model("qwen3"), LoraSpec(4, 8), precision="float32"))
    batch = collate(random_examples(1, seed=1))
    logits = model.logits(batch.tokens[0].tolist())
    assert logits.shape == (batch.tokens.shape[1], 199) and logits.dtype == np.float32
    logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    expected = np.take_along_axis(logps[:-1], batch.tokens[0, 1:, None], axis=-1)[:, 0]
    found = model.logps(batch, np.ones((1, batch.tokens.shape[1] - 1), dtype=bool))
    np.testing.assert_allclose(found[0], expected, atol=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_weight_of_a_step_divides_its_loss_and_gradient(engine, tiny_model):
    batch, results = collate(random_examples(3, seed=2)), []
    for share in (1, 2):
        spec = ModelSpec(tiny_model("llama"), LoraSpec(4, 8), precision="float32")
        model = load_model(engine, spec, OptimizerSpec(max_grad_norm=0.0))
        weight = share * Sft().weight(batch)
        results.append(model.train_step(Sft(), [batch], weight=weight, lr=0.0, step=0))
    assert results[1].loss == pytest.approx(results[0].loss / 2, rel=1e-6)
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm / 2, rel=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_dropout_of_a_process_is_its_own(engine, tiny_model):
    from macft.backends import load_model as load

    spec = ModelSpec(tiny_model("llama"), LoraSpec(4, 8, dropout=0.5), precision="float32")
    batch, losses = collate(random_examples(3, seed=2)), []
    for rank in (0, 1, 1):
        model = load(engine, spec, OptimizerSpec(), ProcessGroup(rank, 2))
        state = model.trained_state()
        model.set_trained_state({name: value + np.float32(0.1) for name, value in state.items()})
        losses.append(train_step(model, Sft(), [batch], lr=0.0, step=0).loss)
    assert losses[0] != losses[1] == losses[2]


@pytest.mark.parametrize("target", ["all", "c_attn"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_without_linear_layers_in_its_blocks_takes_no_adapter(engine, target):
    # a layer outside the blocks, which is all that either engine finds in GPT-2
    if engine == "mlx":
        from mlx.nn import Linear

        from macft.backends.mlx.lora import attach
    else:
        from torch.nn import Linear

        from macft.backends.torch.lora import attach
    with pytest.raises(ModelError, match=r"^lora_target: found no linear layers .*; set finetuning_type to full"):
        attach(Linear(4, 4), LoraSpec(4, 8, target=(target,)), seed=0)


def test_of_several_processes_only_the_main_one_writes(tmp_path, capsys):
    for rank in (0, 1):
        folder, group = tmp_path / str(rank), ProcessGroup(rank, 2)
        folder.mkdir()
        with Report(folder, 2, group=group) as report:
            report.step(StepRecord(step=1, epoch=0.5, loss=1.0, lr=0.1, grad_norm=1.0, tokens=8, seconds=0.1))
            assert report.log()["loss"] == 1.0
            report.message("a word")
        save_checkpoint(folder, Progress("data", step=1), {}, lambda _folder: None, group, keep=None)
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == ["checkpoint-1", "trainer_log.jsonl"]
    assert not list((tmp_path / "1").iterdir())
    assert capsys.readouterr().err.count("a word") == 1
