"""What both engines write, against transformers' own generation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.engines import load_model
from support.toy_backend import ENGINES, write_toy_model
from transformers import AutoModelForCausalLM, GenerationConfig

from macft.backends.base import ModelSpec, Sampling

pytestmark = pytest.mark.usefixtures("small_threads")

NEW = 24
PROMPTS = [[7], [11, 200, 34, 5], np.random.default_rng(1).integers(5, 300, 40).tolist()]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3_text"])
def each_model(request, tmp_path_factory) -> Path:
    # a tied head on Gemma's scaled embeddings says the same token again and again
    return write_toy_model(tmp_path_factory.mktemp(request.param), request.param, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def one_model(tmp_path_factory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("llama"))


def generate(engine: str, folder: Path, prompt: list[int], *, stop=frozenset(), new=NEW, **sampling) -> list[int]:
    backend = load_model(engine, ModelSpec(folder=folder, lora=None, precision="float32"))
    return list(backend.generate(prompt, max_new_tokens=new, stop_ids=frozenset(stop), sampling=Sampling(**sampling)))


def transformers_generate(folder: Path, prompt: list[int], **keys) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **keys)[0, len(prompt) :].tolist()


@pytest.mark.torch
@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_tokens_equal_those_of_transformers(engine, each_model):
    for prompt in PROMPTS:
        expected = transformers_generate(each_model, prompt)
        assert len(expected) == NEW and len(set(expected)) > 3, "a constant answer would prove nothing"
        assert generate(engine, each_model, prompt) == expected


@pytest.mark.torch
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_repetition_penalty_counts_the_prompt_as_transformers_does(engine, penalty, one_model):
    for prompt in PROMPTS:
        expected = transformers_generate(one_model, prompt, repetition_penalty=penalty)
        assert expected != transformers_generate(one_model, prompt), "a penalty without effect would prove nothing"
        assert generate(engine, one_model, prompt, repetition_penalty=penalty) == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_a_seed_repeats_its_sample_and_another_gives_another(engine, one_model):
    def sample(seed: int) -> list[int]:
        return generate(engine, one_model, PROMPTS[1], temperature=1.5, seed=seed)

    assert sample(3) == sample(3)
    assert len({tuple(sample(seed)) for seed in range(4)}) == 4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_limits_that_leave_one_token_make_sampling_greedy(engine, limit, one_model):
    greedy = generate(engine, one_model, PROMPTS[1])
    assert generate(engine, one_model, PROMPTS[1], temperature=2.0, seed=1) != greedy
    assert generate(engine, one_model, PROMPTS[1], temperature=2.0, seed=1, **limit) == greedy


@pytest.mark.parametrize("engine", ENGINES)
def test_sampling_follows_the_probabilities(engine, one_model):
    backend = load_model(engine, ModelSpec(folder=one_model, lora=None, precision="float32"))
    model = AutoModelForCausalLM.from_pretrained(one_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = torch.softmax(model(torch.tensor([PROMPTS[1]])).logits[0, -1] / 2.0, -1).numpy()
    draws = 150
    counts = np.zeros(len(expected))
    for seed in range(draws):
        sampling = Sampling(temperature=2.0, seed=seed)
        counts[list(backend.generate(PROMPTS[1], max_new_tokens=1, stop_ids=frozenset(), sampling=sampling))] += 1
    likely = np.argsort(-expected)[:8]
    # four standard deviations of the share of the likely tokens
    share = expected[likely].sum()
    assert abs(counts[likely].sum() / draws - share) < 4 * np.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(engine, one_model):
    free = generate(engine, one_model, PROMPTS[1])
    stop = free[5]
    first = free.index(stop)
    assert generate(engine, one_model, PROMPTS[1], stop={stop, 599}) == free[:first]
    assert generate(engine, one_model, PROMPTS[1], stop={free[0]}) == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("new", [1, 2, 7])
def test_an_answer_is_no_longer_than_asked(engine, new, one_model):
    assert generate(engine, one_model, PROMPTS[1], new=new) == generate(engine, one_model, PROMPTS[1])[:new]
