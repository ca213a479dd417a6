"""Prompts computed once per pair, padded shapes, a head in chunks: less work, and the same numbers on both engines."""

from __future__ import annotations

import numpy as np
import pytest
from support.engines import load_model
from support.step_numbers import GRADIENT, LORA, Squares, assert_same, load, numbers
from support.tiny_models import random_pairs
from support.toy_backend import ENGINES

from macft.backends.base import ModelSpec
from macft.backends.batch_layout import lay_out, multiples_of, pad_batch, quarter_octaves
from macft.data.batches import collate
from macft.objectives.batch import NumpyBatch
from macft.objectives.preference import answer_positions

pytestmark = pytest.mark.usefixtures("small_threads")

SHARING = ("llama", "qwen2", "qwen3")

LENGTHS = {
    "equal": {"prompt": (14, 14), "answer": (6, 6)},
    "unequal": {"prompt": (3, 30), "answer": (2, 19)},
    "answers of one token": {"prompt": (5, 9), "answer": (1, 1)},
}


def pairs_of(name: str) -> NumpyBatch:
    """Four pairs; in "a prompt of one token" only one of them has a prompt to share."""
    if name == "a prompt of one token":
        lone, long = (random_pairs(1, seed=2, prompt=(n, n), answer=(3, 9)) for n in (1, 17))
        return collate([*long, *lone, *random_pairs(2, seed=4)])
    return collate(random_pairs(4, seed=1, **LENGTHS[name]))


# One prompt pass for both answers


@pytest.mark.parametrize(
    ("lengths", "with_prompt"),
    [*((lengths, True) for lengths in LENGTHS), ("unequal", False), ("a prompt of one token", True)],
)
@pytest.mark.parametrize("architecture", SHARING)
@pytest.mark.parametrize("engine", ENGINES)
def test_shared_prompts_change_no_log_probability_and_no_gradient(
    engine, architecture, lengths, with_prompt, tiny_model
):
    backend, batch = load(engine, tiny_model(architecture)), pairs_of(lengths)
    objective = Squares(with_prompt)
    assert backend._split.shares_prompts
    assert lay_out(batch, objective.positions(batch), share=True).prompts is not None
    shared = numbers(backend, batch, objective)
    backend._split.shares_prompts = False
    assert_same(numbers(backend, batch, objective), shared)


@pytest.mark.parametrize("engine", ENGINES)
def test_shared_prompts_change_no_gradient_of_the_whole_model(engine, tiny_model):
    """The embeddings, tied to the head, have three paths to the loss."""
    backend, batch = load(engine, tiny_model("llama"), lora=None, full=True), pairs_of("unequal")
    shared = numbers(backend, batch)
    backend._split.shares_prompts = False
    assert_same(numbers(backend, batch), shared)


@pytest.mark.torch
@pytest.mark.parametrize("architecture", [*SHARING, "gemma3_text"])
@pytest.mark.parametrize("engine", ENGINES)
def test_pairs_score_as_transformers_scores_each_row_alone(engine, architecture, tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    folder, batch = tiny_model(architecture), pairs_of("unequal")
    real = np.arange(1, batch.tokens.shape[1]) < batch.lengths[:, None]
    ours = load(engine, folder, lora=None).logps(batch, real)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for row, tokens, length in zip(ours, batch.tokens, batch.lengths, strict=True):
        ids = torch.from_numpy(tokens[:length]).long()
        with torch.no_grad():
            theirs = torch.log_softmax(model(ids[None]).logits[0, :-1], dim=-1)[torch.arange(length - 1), ids[1:]]
        np.testing.assert_allclose(row[: length - 1], theirs, rtol=1e-5, atol=2e-5)
        np.testing.assert_array_equal(row[length - 1 :], 0)


def test_a_prompt_is_read_once():
    batch = collate(random_pairs(2, prompt=(21, 21), answer=(10, 10)))
    answers = answer_positions(batch, with_prompt=False)
    plain, shared = (lay_out(batch, answers, share=share) for share in (False, True))
    # each row is read but for its last token; a shared prompt gives its own last token to both answers
    assert plain.inputs.shape == (4, 30)
    assert (shared.prompts.shape, shared.inputs.shape) == ((2, 20), (4, 10))
    assert len(plain.rows) == len(shared.rows) == 40
    with_prompt = lay_out(batch, answer_positions(batch, with_prompt=True), share=True)
    assert len(with_prompt.rows) == 40 + 2 * 20


@pytest.mark.torch
def test_the_model_reads_what_the_layout_says(tiny_model):
    backend, batch = load("torch", tiny_model("qwen3")), collate(random_pairs(2, prompt=(21, 21), answer=(10, 10)))
    read = []
    backend._model.get_decoder().embed_tokens.register_forward_hook(lambda _module, args, _out: read.append(args[0]))
    for shares, expected in ((True, 2 * 20 + 4 * 10), (False, 4 * 30)):
        read.clear()
        backend._split.shares_prompts = shares
        backend.logps(batch, answer_positions(batch, with_prompt=True))
        assert sum(ids.numel() for ids in read) == expected


@pytest.mark.parametrize(
    ("prompt", "answer", "shares"),
    # 4 rows of 19 + 2 tokens less one, or 2 of 2 and 4 of 19: 80 or 80; a prompt of one has nothing to share
    [(1, 9, False), (3, 19, False), (5, 19, True), (30, 2, True)],
)
def test_prompts_are_shared_where_that_saves_a_twentieth(prompt, answer, shares):
    batch = collate(random_pairs(2, prompt=(prompt, prompt), answer=(answer, answer)))
    layout = lay_out(batch, answer_positions(batch, with_prompt=True), share=True)
    assert (layout.prompts is not None) == shares


def test_rows_without_pairs_are_never_shared():
    batch = collate([pair.chosen for pair in random_pairs(4, prompt=(30, 30))])
    assert lay_out(batch, batch.loss_mask[:, 1:], share=True).prompts is None


# Where prompts cannot be shared


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sliding_window_is_not_shared_and_not_worth_a_word(engine, tiny_model):
    backend = load_model(engine, ModelSpec(folder=tiny_model("gemma3_text"), lora=LORA, precision="float32"), GRADIENT)
    assert not backend._split.shares_prompts
    assert backend.info.notes == ()
    # the check is needed: rows are longer than the window, and sharing would change them
    batch = pairs_of("unequal")
    plain = numbers(backend, batch)
    backend._split.shares_prompts = True
    with pytest.raises(AssertionError):
        assert_same(plain, numbers(backend, batch))


@pytest.mark.parametrize("engine", ENGINES)
def test_gradient_checkpointing_does_not_share_and_changes_no_number(engine, tiny_model):
    backend, batch = load(engine, tiny_model("qwen2")), pairs_of("unequal")
    checkpointed = load(engine, tiny_model("qwen2"), gradient_checkpointing=True)
    assert backend._split.shares_prompts
    assert not checkpointed._split.shares_prompts
    assert_same(numbers(backend, batch), numbers(checkpointed, batch))


# Padded shapes, and the compiled step


def test_padded_sizes_are_few():
    """Worked out by hand: 32 apart up to 256, then four between a power of two and the next."""
    sizes = [32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048]
    assert sorted({quarter_octaves(size) for size in range(1, 2049)}) == sizes
    assert all(size <= quarter_octaves(size) < max(size + 32, 1.25 * size) for size in range(1, 4097))
    assert quarter_octaves(0) == 0


@pytest.mark.parametrize("lengths", [*LENGTHS, "a prompt of one token"])
def test_shapes_are_padded_to_the_multiple(lengths):
    batch = pad_batch(pairs_of(lengths), multiples_of(32))
    assert batch.tokens.shape[1] % 32 == 1
    for share in (False, True):
        layout = lay_out(batch, answer_positions(batch, with_prompt=True), share=share, round_up=multiples_of(32))
        widths = [layout.inputs.shape[1], *(a.shape[0] for a in (layout.rows, layout.targets, layout.scatter_index))]
        widths += [layout.prompts.shape[1]] if layout.prompts is not None else []
        assert [width % 32 for width in widths] == [0] * len(widths)
        assert layout.valid.sum() == answer_positions(batch, with_prompt=True).sum()


@pytest.mark.mlx
@pytest.mark.parametrize(
    ("architecture", "shares"), [pytest.param("llama", True, marks=pytest.mark.slow), ("qwen3", True), ("qwen2", False)]
)
def test_the_compiled_step_on_padded_shapes_changes_no_number(architecture, shares, tiny_model, request):
    batches = [collate(random_pairs(2, seed=seed, prompt=(50, 60), answer=(5, 30))) for seed in (1, 2)]
    results = []
    for _ in range(2):
        backend = load("mlx", tiny_model(architecture))
        backend._split.shares_prompts = shares
        results.append([numbers(backend, batch) for batch in batches])
        request.getfixturevalue("mac")
    [step] = backend._steps.values()
    assert len(step.shapes) == 1, "both batches fit one padded shape"
    eager, compiled = results
    for a, b in zip(eager, compiled, strict=True):
        assert_same(a, b)


@pytest.mark.torch
def test_padded_layouts_change_no_number_on_pytorch_either(tiny_model):
    from macft.backends.torch.step import token_logps

    backend, batch = load("torch", tiny_model("qwen3")), pairs_of("unequal")
    positions = answer_positions(batch, with_prompt=True)
    plain = backend.logps(batch, positions)
    for share in (False, True):
        padded = lay_out(batch, positions, share=share, round_up=multiples_of(32))
        logps = token_logps(backend._split, padded, positions.shape).detach().numpy()
        np.testing.assert_allclose(logps, plain, rtol=1e-5, atol=1e-5)


# The head in chunks


@pytest.mark.parametrize("architecture", [*SHARING, "gemma3_text"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_head_in_chunks_is_the_whole_head(engine, architecture, tiny_model):
    backend, batch = load(engine, tiny_model(architecture)), pairs_of("unequal")
    assert backend._split.lm_head_is_frozen
    assert backend._split._rows_at_once > 1000
    one_chunk = numbers(backend, batch)
    backend._split._rows_at_once = 3
    chunks = numbers(backend, batch)
    backend._split.lm_head_is_frozen = False  # differentiated by the framework
    whole = numbers(backend, batch)
    assert_same(whole, chunks)
    assert_same(whole, one_chunk)
