"""Preference training against TRL's own DPOTrainer: the same rows from the same adapter, step by step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.data_rows import read_pairs, tokenize_pairs
from support.paths import CHECKOUT
from support.tiny_models import VOCABULARY
from support.trl_runs import (
    EOS,
    STEPS,
    Job,
    Kind,
    Run,
    assert_moved,
    check,
    prepare,
    run_macft,
    run_trl,
    word_tokenizer,
    words,
)

from macft.backends.base import LoraSpec, Model
from macft.data.batches import collate, row_length
from macft.data.templates.chat_template import load_template
from macft.data.tokenization.table import Reference, TokenizedExample, TokenizedPair
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.engines import BACKENDS
from macft.models.locate import resolve_model
from macft.objectives.preference import Preference, answer_positions, reference_columns

pytest.importorskip("trl", reason="trl is not installed: pip install trl")

# TRL's own trainer runs beside both engines
pytestmark = [pytest.mark.slow, pytest.mark.mlx, pytest.mark.torch]

ENGINES = tuple(BACKENDS)
DPO = Kind(
    "DPO",
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"),
)

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


def run(engine: str, job: Job, objective: Preference) -> Run:
    """macft's run, whose reference is the adapter that it starts from."""

    def score(model: Model, pairs: list[TokenizedPair]) -> list[TokenizedPair]:
        batch = collate(pairs)
        logps = model.logps(batch, answer_positions(batch, with_prompt=True))
        columns = zip(*reference_columns(logps, batch, objective.ld_alpha), strict=True)
        return [replace(pair, reference=Reference(*values)) for pair, values in zip(pairs, columns, strict=True)]

    return run_macft(engine, job, objective, score)


@pytest.mark.parametrize("loss", LOSSES)
def test_ten_steps_from_a_trained_adapter_are_those_of_trl(loss, tiny_model, tmp_path):
    objective, settings = LOSSES[loss]
    pairs = random_pairs(40)
    job = prepare(tiny_model("llama"), LoraSpec(4, 8), pairs, [*map(ids, pairs)], fresh=False, batch_size=4, lr=5e-3)
    expected = run_trl(DPO, job, tmp_path, as_words(pairs), word_tokenizer(), settings)
    assert_moved(job, expected)
    for engine in ENGINES:
        check(run(engine, job, objective), expected)


def test_ten_steps_from_a_fresh_adapter_are_those_of_trl(tiny_model, tmp_path):
    objective, settings = LOSSES["sigmoid"]
    pairs = random_pairs(20)
    job = prepare(tiny_model("llama"), LoraSpec(4, 8), pairs, [*map(ids, pairs)], fresh=True, batch_size=2, lr=5e-3)
    expected = run_trl(DPO, job, tmp_path, as_words(pairs), word_tokenizer(), settings, fresh=True)
    assert_moved(job, expected)
    for engine in ENGINES:
        check(run(engine, job, objective), expected)


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
    pairs = [pair for _, pair in both]
    job = prepare(folder, LoraSpec(8, 16), pairs, [*map(ids, pairs)], fresh=False, batch_size=2, lr=2e-4)
    expected = run_trl(DPO, job, tmp_path, rows, PreTrainedTokenizerFast.from_pretrained(folder), settings)
    assert_moved(job, expected)
    for engine in ENGINES:
        check(run(engine, job, objective), expected)


def ids(pair: TokenizedPair) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the prompt and of both answers."""
    chosen, rejected = pair.chosen.tokens.tolist(), pair.rejected.tokens.tolist()
    return chosen[: pair.prompt_length], chosen[pair.prompt_length :], rejected[pair.prompt_length :]


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
