"""A padding token is told by its place, not its id: in a text it is a token like any other, on both engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.engines import load_model, train_step
from support.tiny_models import VOCABULARY, random_examples, random_pairs, write_model

from macft.backends.base import ModelSpec, OptimizerSpec, State, StepResult
from macft.data.batches import collate
from macft.data.tokenization.table import TokenizedExample
from macft.engines import BACKENDS
from macft.objectives.batch import NumpyBatch
from macft.objectives.losses import Objective, Sft
from macft.objectives.preference import Preference

pytestmark = [pytest.mark.mlx, pytest.mark.torch, pytest.mark.usefixtures("small_threads")]

# with beta1 = 0 Adam's first moment is the gradient
GRADIENT = OptimizerSpec(beta1=0.0, max_grad_norm=0.0)
EMBEDDING = "model.embed_tokens.weight.exp_avg"
END = 2  # of every row, as eos is
IDS = {"of the texts": END, "the last, counted from the end": -1, "beyond the rows": VOCABULARY}


def with_pad(source: Path, folder: Path, pad: int | None) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
    return folder


def rows() -> list[TokenizedExample]:
    examples = random_examples(3, seed=4)
    for example in examples:
        example.tokens[[1, 4]] = END, VOCABULARY - 1
    return examples


def step(engine: str, folder: Path, objective: Objective, batch: NumpyBatch, **keys) -> tuple[StepResult, State]:
    spec = ModelSpec(folder, lora=None, full=True, precision="float32", **keys)
    model = load_model(engine, spec, GRADIENT)
    return train_step(model, objective, [batch], lr=0.0, step=0), model.optimizer_state()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])  # gemma's embedding has a class of its own
@pytest.mark.parametrize("engine", BACKENDS)
def test_the_padding_tokens_row_has_the_gradient_of_transformers_without_one(
    engine, architecture, tiny_model, tmp_path
):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(with_pad(tiny_model(architecture), tmp_path / "none", None))
    examples = rows()
    for example in examples:
        tokens = torch.from_numpy(example.tokens).long()[None]
        labels = torch.where(torch.from_numpy(example.loss_mask), tokens, torch.tensor(-100))
        scores = plain(input_ids=tokens).logits[0, :-1]
        torch.nn.functional.cross_entropy(scores, labels[0, 1:], ignore_index=-100, reduction="sum").backward()
    count = sum(example.loss_mask[1:].sum() for example in examples)
    wanted = plain.get_input_embeddings().weight.grad.numpy() / count
    assert min(np.abs(wanted[row]).max() for row in (END, VOCABULARY - 1)) > 1e-3
    for name, pad in IDS.items():
        folder = with_pad(tiny_model(architecture), tmp_path / name, pad)
        _, moments = step(engine, folder, Sft(), collate(examples))
        # float32 sums in another order
        np.testing.assert_allclose(moments[EMBEDDING], wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("start", ["its weights", "random weights"])
@pytest.mark.parametrize("objective", ["sft", "orpo"])
@pytest.mark.parametrize("engine", BACKENDS)
def test_no_id_of_the_padding_token_changes_a_number(engine, objective, start, tiny_model, tmp_path):
    pairs = random_pairs(3, seed=4)
    for pair in pairs:
        pair.chosen.tokens[1] = pair.rejected.tokens[1] = END
    made, batch = {"sft": (Sft(), collate(rows())), "orpo": (Preference(loss="orpo"), collate(pairs))}[objective]
    found = {}
    for name, pad in {"none": None, **IDS}.items():
        folder = with_pad(tiny_model("qwen2"), tmp_path / name, pad)
        result, moments = step(engine, folder, made, batch, from_scratch=start == "random weights")
        found[name] = result.loss, result.grad_norm
        assert np.abs(moments[EMBEDDING][END]).max() > 0
    assert len(set(found.values())) == 1, found


def test_a_default_of_transformers_beyond_a_small_vocabulary_is_no_obstacle(tmp_path):
    """Phi3's padding token is 32000 unless config.json names one."""
    folder = write_model(tmp_path / "phi3", "phi3")
    config = json.loads((folder / "config.json").read_text())
    del config["pad_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    batch = collate(rows())
    found = {engine: step(engine, folder, Sft(), batch)[0] for engine in BACKENDS}
    assert found["torch"].loss == pytest.approx(found["mlx"].loss, rel=1e-5)
    assert found["torch"].grad_norm == pytest.approx(found["mlx"].grad_norm, rel=1e-5)
