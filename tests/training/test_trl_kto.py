"""KTO against TRL's own KTOTrainer: the same batches from the same adapter, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.tiny_models import random_feedback
from support.trl_runs import (
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
from macft.data.batches import collate
from macft.data.tokenization.table import FeedbackReference, TokenizedFeedback
from macft.engines import BACKENDS
from macft.objectives.kto import Kto, answer_scores
from macft.objectives.ops import NumpyOps

pytest.importorskip("trl", reason="trl is not installed: pip install trl")

# TRL's own trainer runs beside both engines
pytestmark = [pytest.mark.slow, pytest.mark.mlx, pytest.mark.torch]

ENGINES = tuple(BACKENDS)
KTO = Kind(
    "KTO",
    ("prompt_ids", "completion_ids", "KL_completion_ids"),
    ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl"),
)

# (macft's objective, TRL's settings, rows in a batch, whether the adapter is a fresh one)
CASES = {
    "kto": (Kto(beta=0.5), {"beta": 0.5}, 4, False),
    "weights": (
        Kto(beta=0.2, chosen_weight=1.3, rejected_weight=0.7),
        {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        5,
        False,
    ),
    "a fresh adapter": (Kto(beta=0.5), {"beta": 0.5}, 3, True),
}


def run(engine: str, job: Job, objective: Kto) -> Run:
    """macft's run, whose reference is the adapter that it starts from."""

    def score(model: Model, rows: list[TokenizedFeedback]) -> list[TokenizedFeedback]:
        batch = collate(rows)
        scores, _ = answer_scores(NumpyOps(), model.logps(batch, batch.loss_mask[:, 1:]), batch)
        both = zip(scores[: len(rows)], scores[len(rows) :], strict=True)
        return [replace(row, reference=FeedbackReference(*two)) for row, two in zip(rows, both, strict=True)]

    return run_macft(engine, job, objective, score)


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_those_of_trl(name, tiny_model, tmp_path):
    objective, settings, size, fresh = CASES[name]
    rows = random_feedback(size * STEPS, size)
    ids = [ids_of(row) for row in rows]
    job = prepare(tiny_model("llama"), LoraSpec(4, 8), rows, ids, fresh=fresh, batch_size=size, lr=5e-3)
    texts = [
        {"prompt": words(prompt) + " ", "completion": words(answer), "label": row.is_desirable}
        for row, (prompt, answer, _) in zip(rows, ids, strict=True)
    ]
    expected = run_trl(KTO, job, tmp_path, texts, word_tokenizer(), settings, fresh=fresh)
    assert_moved(job, expected)
    # the KL term takes part, and is cut off at 0 in some step
    assert expected.curves["kl"].max() > 0.05 and expected.curves["kl"].min() == 0
    for engine in ENGINES:
        check(run(engine, job, objective), expected)


def ids_of(row: TokenizedFeedback) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the prompt, of its answer and of the other one."""
    one, other = row.row, row.mismatched
    return (
        one.tokens[~one.loss_mask].tolist(),
        one.tokens[one.loss_mask].tolist(),
        other.tokens[other.loss_mask].tolist(),
    )
