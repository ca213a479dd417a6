"""Tokenizer fields of exported files: against llama.cpp's own converter, and in llama.cpp against the original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from support.data_folders import own_and_public_qwen
from support.gguf_converter import Job, convert
from support.gguf_tokenizers import (
    CHAT,
    GEMMA_PIECES,
    PHI_PIECES,
    added,
    ids,
    random_texts,
    sentencepiece_ids,
    write_weights,
)
from support.gguf_vocabularies import fields_of, plain, vocabulary_size, write_byte_fallback, write_byte_level, written
from support.tiny_gguf import CONTROL, TEXT, llama_cpp, write_spm_model
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import ModelError
from macft.gguf.format import read_gguf
from macft.gguf.vocabulary.pre_tokenizers import _CUTS_AS
from macft.gguf.vocabulary.sentencepiece import read_sentencepiece
from macft.models.locate import resolve_model


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def their_fields(path: Path) -> dict[str, Any]:
    fields = read_gguf(path).fields
    return {name: value for name, value in fields.items() if name.startswith("tokenizer.")}


def differing(folder: Path) -> dict[str, Any]:
    """name -> (the converter's value, ours) of each field that is not equal; of long ones by index, 20 at most."""
    config, theirs = read_config(folder), their_fields(Path(f"{folder}.gguf"))
    ours = plain(fields_of(folder, rows=config["vocab_size"], **config))
    found: dict[str, Any] = {}
    for name in dict.fromkeys([*theirs, *ours]):
        first, second = theirs.get(name), ours.get(name)
        if first != second:
            found[name] = (first, second)
            if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
                pairs = enumerate(zip(first, second, strict=True))
                found[name] = dict([(index, pair) for index, pair in pairs if pair[0] != pair[1]][:20])
    return found


# --- llama.cpp's converter


SPM_CASES = {
    "llama": (("<user_defined>",), ()),
    "gemma2": (GEMMA_PIECES, GEMMA_PIECES[:2]),
    "phi3": (PHI_PIECES, PHI_PIECES),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of model folders, beside each the file that the converter made of it; all in one process."""
    root = tmp_path_factory.mktemp("converted")
    source = resolve_model("smollm2-135m").path
    write_weights(root / "smollm2", "llama", 49152)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(source / name, root / "smollm2" / name)
    for model_type, (own, special) in SPM_CASES.items():
        settings = added(own, 6, special=special) if special else {}
        rows = write_spm_model(root / model_type, own=own, settings=settings) + 3  # an embedding with rows to spare
        write_weights(root / model_type, model_type, rows)
    convert([Job(str(folder), f"{folder}.gguf") for folder in sorted(root.iterdir())])
    return root


@pytest.mark.torch
def test_smollm2_fields_equal_the_converter(converted: Path) -> None:
    assert differing(converted / "smollm2") == {}


@own_and_public_qwen
@pytest.mark.torch
def test_qwen_fields_equal_the_converter(tmp_path: Path, qwen: Path) -> None:
    folder, original = tmp_path / "qwen", read_config(qwen)
    write_weights(folder, "qwen2", original["vocab_size"])
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(qwen / name, folder / name)
    config = {key: value for key, value in read_config(folder).items() if key != "pad_token_id"}
    config |= {key: original[key] for key in ("bos_token_id", "eos_token_id")}
    (folder / "config.json").write_text(json.dumps(config))
    # the converter finds the pre-tokenizer of the real one by itself
    convert([Job(str(folder), f"{folder}.gguf", pre="" if original["vocab_size"] > 100_000 else "qwen2")])
    end, turn_end = original["bos_token_id"], original["eos_token_id"]
    assert differing(folder) == {
        # without a tokenizer.json the converter reads no roles but those in config.json
        "tokenizer.ggml.padding_token_id": (None, end),
        # generation_config.json names <|endoftext|> as an end too, which the converter does not read
        "tokenizer.ggml.eot_token_id": (None, end),
        "tokenizer.ggml.eos_token_ids": (None, [turn_end, end]),
        # said as it is, where the converter leaves it to what llama.cpp assumes
        "tokenizer.ggml.add_eos_token": (None, False),
    }


@pytest.mark.torch
@pytest.mark.parametrize("model_type", SPM_CASES)
def test_sentencepiece_fields_equal_the_converter(converted: Path, model_type: str) -> None:
    own, special = SPM_CASES[model_type]
    found = differing(converted / model_type)
    # what the converter leaves out has the value that llama.cpp assumes for SentencePiece
    assert found.pop("tokenizer.ggml.unknown_token_id") == (None, 0)
    assert found.pop("tokenizer.ggml.add_bos_token") == (None, True)
    if model_type != "gemma2":
        assert found.pop("tokenizer.ggml.add_space_prefix") == (None, True)
    if special:
        # tokens that are cut out of a text are never merged, so nothing reads their scores
        assert set(found.pop("tokenizer.ggml.scores")) == set(range(6, 6 + len(own)))
    else:
        # SentencePiece never cuts a user-defined piece; the converter makes it a normal token, which llama.cpp cuts
        changed = found.pop("tokenizer.ggml.token_type")
        assert changed == {6: (gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED)}
    assert found == {}


# --- real llama.cpp


def assert_llama_cpp_agrees(path: Path, original: Callable[[str], list[int]], texts: list[str]) -> None:
    with llama_cpp(path) as oracle:
        for text in texts:
            assert oracle.tokenize(text) == original(text), text


@pytest.mark.parametrize("has_new_tokens", [False, True])
def test_smollm2_ids_in_llama_cpp_equal_the_original(tmp_path: Path, has_new_tokens: bool) -> None:
    """Tokens that a fine-tune adds do not change the hash, which is of a text without them."""
    source = resolve_model("smollm2-135m").path
    folder = tmp_path / "model"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if has_new_tokens:
        core.add_special_tokens([AddedToken("<|new|>", normalized=False)])
        core.add_tokens([AddedToken("plain_new", normalized=False)])
        core.save(str(folder / "tokenizer.json"))
    fields = fields_of(folder, rows=49160)
    assert fields["tokenizer.ggml.pre"] == "smollm"
    texts = [TEXT, CHAT, "a <|new|> b plain_new c", *random_texts(60, 5)]
    assert_llama_cpp_agrees(written(tmp_path / "m.gguf", fields), lambda text: ids(core, text), texts)


def test_qwen_ids_in_llama_cpp_equal_the_original(tmp_path: Path, qwen: Path) -> None:
    import unicodedata

    tokenizer, config = load_tokenizer(qwen), read_config(qwen)
    fields = fields_of(qwen, rows=config["vocab_size"], **config)
    # the original composes characters first (NFC), llama.cpp takes them as they are
    texts = [unicodedata.normalize("NFC", text) for text in (TEXT, CHAT, *random_texts(60, 6))]
    assert_llama_cpp_agrees(written(tmp_path / "m.gguf", fields), lambda text: tokenizer.encode(text).ids, texts)
    assert vocabulary_size(qwen) == tokenizer.vocab_size < config["vocab_size"]


ASCII_AND_HAN = [
    TEXT.replace("Ünï ẞ", "").replace("naïve", "").replace("café", ""),
    CHAT,
    "HELLOworld HelloWorld x's X'S",
]
_C = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_START, _TAIL = r"[^\r\n\p{L}\p{N}]?", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UP, _LOW = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# the regular expressions as the published tokenizer.json files have them
LLAMA3_SPLIT = rf"{_C}|{_START}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
QWEN35_SPLIT = rf"{_C}|{_START}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
GPT4O_SPLIT = (
    rf"{_START}{_UP}*{_LOW}+{_C}?|{_START}{_UP}+{_LOW}*{_C}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
TEKKEN_SPLIT = rf"{_START}{_UP}*{_LOW}+|{_START}{_UP}+{_LOW}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
DEEPSEEK3_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
BY_STRUCTURE: dict[str, tuple[list[Any], bool]] = {
    "llama-bpe": ([LLAMA3_SPLIT], True),
    "smaug-bpe": ([LLAMA3_SPLIT], False),
    "qwen2": ([QWEN2_SPLIT], False),
    "qwen35": ([QWEN35_SPLIT], False),
    "tekken": ([TEKKEN_SPLIT], True),
    "gpt-4o": ([GPT4O_SPLIT], False),
    "deepseek-v3": (list(DEEPSEEK3_SPLITS), False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), "gpt2"], False),
    "gpt-2": (["gpt2"], False),
}


@pytest.mark.parametrize("name", BY_STRUCTURE)
def test_a_new_vocabulary_is_known_by_how_it_is_cut(tmp_path: Path, name: str) -> None:
    steps, whole_words = BY_STRUCTURE[name]
    core = write_byte_level(tmp_path, steps, whole_words, as_strings=name == "qwen2")
    fields = fields_of(tmp_path)
    assert fields["tokenizer.ggml.pre"] == name
    # for these two llama.cpp tells upper case from lower among ASCII letters alone
    texts = ASCII_AND_HAN if name in ("tekken", "gpt-4o") else [TEXT, CHAT, *random_texts(60, 7)]
    assert_llama_cpp_agrees(written(tmp_path / "m.gguf", fields), lambda text: ids(core, text), texts)


def test_an_unknown_pre_tokenizer_is_refused_with_its_regexes(tmp_path: Path) -> None:
    write_byte_level(tmp_path, [r"\p{N}{1,7}", "gpt2"], False)
    with pytest.raises(ModelError, match=r"(?s)llama.cpp knows no pre-tokenizer.*\\p\{N\}\{1,7\}.*'s\|'t"):
        fields_of(tmp_path)
    core = write_byte_level(tmp_path, ["gpt2"], False)
    core.normalizer = normalizers.Lowercase()
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"changes text before by .*Lowercase"):
        fields_of(tmp_path)


def smollm2_tokenizer(folder: Path, **changes: Any) -> Tokenizer:
    """SmolLM2's vocabulary, by whose ids llama.cpp's converter knows it, under other rules."""
    source = resolve_model("smollm2-135m").path
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8")) | changes
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    shutil.copy(source / "tokenizer_config.json", folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_a_published_vocabulary_under_other_rules_is_cut_by_its_own(tmp_path: Path) -> None:
    """The hash of its ids is SmolLM2's, which isolates digits: "  12" and "²" would get other tokens."""
    plain_cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    core = smollm2_tokenizer(tmp_path, pre_tokenizer=plain_cut)
    fields = fields_of(tmp_path)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    texts = [TEXT, CHAT, "  12\r\n 3 ½²", *random_texts(60, 8)]
    assert_llama_cpp_agrees(written(tmp_path / "m.gguf", fields), lambda text: ids(core, text), texts)
    other = written(tmp_path / "other.gguf", {**fields, "tokenizer.ggml.pre": "smollm"})
    with llama_cpp(other) as oracle:
        assert oracle.tokenize("  12") != ids(core, "  12")


def test_a_published_vocabulary_under_a_normalizer_is_refused(tmp_path: Path) -> None:
    smollm2_tokenizer(tmp_path, normalizer={"type": "Replace", "pattern": {"String": "colour"}, "content": "color"})
    with pytest.raises(ModelError, match=r"changes text before by .*colour"):
        fields_of(tmp_path)


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "gpt-4o", "deepseek-v3", "smollm"])
def test_names_said_to_cut_alike_do_so_in_llama_cpp(tmp_path: Path, name: str) -> None:
    steps, whole_words = BY_STRUCTURE[name]
    write_byte_level(tmp_path, steps, whole_words)
    fields = fields_of(tmp_path)
    texts = [TEXT, CHAT, *random_texts(30, 9)]

    def ids_under(pre: str) -> list[list[int]]:
        with llama_cpp(written(tmp_path / f"{pre}.gguf", {**fields, "tokenizer.ggml.pre": pre})) as oracle:
            return [oracle.tokenize(text) for text in texts]

    expected = ids_under(name)
    for alias in (alias for alias, known in _CUTS_AS.items() if known == name != alias):
        assert ids_under(alias) == expected, alias


# --- SentencePiece in llama.cpp


def test_tokenizer_model_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    import sentencepiece as library

    write_spm_model(tmp_path, own=GEMMA_PIECES)
    theirs = library.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = read_sentencepiece(tmp_path / "tokenizer.model")
    assert len(ours.texts) == theirs.vocab_size()
    for id_, text in enumerate(ours.texts):
        assert (text, ours.scores[id_]) == (theirs.id_to_piece(id_), theirs.get_score(id_))
        kinds = [theirs.is_unknown(id_), theirs.is_control(id_), theirs.is_byte(id_), theirs.is_unused(id_)]
        assert [ours.types[id_] == kind for kind in (2, 3, 6, 5)] == kinds
    assert ours.ids == {"unk": 0, "bos": 1, "eos": 2} and ours.add_dummy_prefix
    whole = (tmp_path / "tokenizer.model").read_bytes()
    for content in (whole[:-9], b"IQ== 0\nIg== 1\n", b""):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ModelError, match="not a SentencePiece model"):
            read_sentencepiece(tmp_path / "tokenizer.model")


def test_tokenizer_model_ids_in_llama_cpp_equal_sentencepiece(tmp_path: Path) -> None:
    write_spm_model(tmp_path)
    original = sentencepiece_ids(tmp_path)
    cut_out = (*CONTROL, "<s>", "<user_defined>")
    texts = [text for text in random_texts(100, 8) if not any(token in text for token in cut_out)]
    path = written(tmp_path / "m.gguf", fields_of(tmp_path))
    assert_llama_cpp_agrees(path, original, [TEXT.split("<|im_start|>")[0], *texts])


@pytest.mark.parametrize("prefix", [True, False])
def test_byte_fallback_ids_in_llama_cpp_equal_the_original(tmp_path: Path, prefix: bool) -> None:
    """The converter gives all tokens one score here, with which llama.cpp merges in another order."""
    core = write_byte_fallback(tmp_path, prefix=prefix)
    fields = fields_of(tmp_path)
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_space_prefix"] is prefix
    texts = [TEXT, CHAT, "x <s> y</s>z", *random_texts(100, 9)]
    assert_llama_cpp_agrees(written(tmp_path / "m.gguf", fields), lambda text: ids(core, text), texts)


def test_merges_that_llama_cpp_would_add_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    core = write_byte_fallback(tmp_path, prefix=True)
    fields_of(tmp_path)
    assert caplog.text == ""
    content = json.loads(core.to_str())
    seen: set[str] = set()
    merges = content["model"]["merges"]
    content["model"]["merges"] = [pair for pair in merges if not ("".join(pair) in seen or seen.add("".join(pair)))]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    fields_of(tmp_path)
    assert f"joins tokens in {len(merges) - len(seen)} ways more" in caplog.text


def test_tokenizer_model_beside_tokenizer_json_gives_the_scores(tmp_path: Path) -> None:
    write_spm_model(tmp_path)
    pieces = read_sentencepiece(tmp_path / "tokenizer.model")
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(pieces.texts)}, merges=[], byte_fallback=True))
    core.add_special_tokens([AddedToken("<|later|>", normalized=False)])
    core.save(str(tmp_path / "tokenizer.json"))
    fields = plain(fields_of(tmp_path))
    assert fields["tokenizer.ggml.scores"] == [*pieces.scores, -1000.0]
    assert fields["tokenizer.ggml.token_type"] == [*pieces.types, gguf.TokenType.CONTROL]
    assert fields["tokenizer.ggml.tokens"][-1] == "<|later|>"
