"""Tokenizers of .gguf files that llama.cpp's converter made: ids against llama.cpp and the original tokenizer."""

from __future__ import annotations

import json
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

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
from support.tiny_gguf import CONTROL, TEXT, llama_cpp, write_spm_model
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from macft.gguf.importer.model import import_gguf


def imported(folder: Path, *, pre: str = "") -> Path:
    """`folder` through llama.cpp's converter and our import; the .gguf file stays beside it."""
    convert([Job(str(folder), str(folder) + ".gguf", outtype="f16", pre=pre)])
    import_gguf(Path(str(folder) + ".gguf"), folder.with_name("imported"))
    return folder.with_name("imported")


def assert_llama_cpp_agrees(folder: Path, texts: Iterator[str]) -> Tokenizer:
    """`folder` is the original one; returns the imported tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder.with_name("imported") / "tokenizer.json"))
    with llama_cpp(Path(str(folder) + ".gguf")) as oracle:
        for text in texts:
            assert ids(tokenizer, text) == oracle.tokenize(text), text
        assert tokenizer.encode("hello").ids == oracle.tokenize("hello", add_special=True)
    return tokenizer


def texts(count: int = 60, seed: int = 5) -> Iterator[str]:
    yield from (TEXT, CHAT, "", " ", "\n", " x", "a\n\nb\n\n\nc  d   e    f     g\t\th", "x<user_defined> y  <s> z")
    yield from random_texts(count, seed)


@own_and_public_qwen
@pytest.mark.torch
def test_qwen_ids_equal_llama_cpp_and_the_original(tmp_path: Path, qwen: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "original"
    config = json.loads((qwen / "config.json").read_text(encoding="utf-8"))
    write_weights(folder, "qwen2", config["vocab_size"])
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(qwen / name, folder / name)
    # the converter finds the pre-tokenizer of the real one by itself
    result = imported(folder, pre="" if config["vocab_size"] > 100_000 else "qwen2")
    tokenizer = assert_llama_cpp_agrees(folder, texts())
    original = AutoTokenizer.from_pretrained(qwen)
    for text in texts(200, seed=6):
        # the original composes characters first (NFC), llama.cpp takes them as they are
        composed = unicodedata.normalize("NFC", text)
        assert ids(tokenizer, composed) == original.encode(composed), text
    assert tokenizer.decode(ids(tokenizer, TEXT), skip_special_tokens=False) == TEXT
    template = json.loads((qwen / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    assert (result / "chat_template.jinja").read_text(encoding="utf-8") == template


@pytest.mark.torch
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_sentencepiece_ids_equal_llama_cpp_and_the_original(tmp_path: Path, model_type: str) -> None:
    folder = tmp_path / "original"
    write_weights(folder, model_type, write_spm_model(folder))
    imported(folder)
    tokenizer = assert_llama_cpp_agrees(folder, texts())
    original = sentencepiece_ids(folder)
    for text in texts(200, seed=6):
        if text and not any(token in text for token in (*CONTROL, "<s>", "<user_defined>")):
            assert ids(tokenizer, text) == original(text), text


@pytest.mark.torch
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_gemma_ids_equal_llama_cpp_and_the_original(tmp_path: Path, model_type: str) -> None:
    """No space before the text; runs of spaces and lines are user-defined tokens."""
    folder = tmp_path / "original"
    special = GEMMA_PIECES[:2]
    size = write_spm_model(folder, own=GEMMA_PIECES, settings=added(GEMMA_PIECES, 6, special=special))
    write_weights(folder, model_type, size)
    imported(folder)
    chat = "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    tokenizer = assert_llama_cpp_agrees(folder, iter([chat, *texts()]))
    assert tokenizer.token_to_id("<end_of_turn>") == 7
    # the library puts a space before the text, which is there to be cut off again
    original = sentencepiece_ids(folder)
    for text in texts(200, seed=6):
        if text and not text.startswith(" ") and not any(token in text for token in (*CONTROL, "<s>")):
            assert ids(tokenizer, "\n" + text) == [token for token in original("\n" + text)][1:], text


@pytest.mark.torch
def test_phi3_special_tokens_swallow_the_space_after_them(tmp_path: Path) -> None:
    folder = tmp_path / "phi3-tiny"  # llama.cpp goes by the name
    size = write_spm_model(folder, own=PHI_PIECES, settings=added(PHI_PIECES, 6, special=PHI_PIECES))
    write_weights(folder, "phi3", size)
    imported(folder)
    chat = "<|user|>\n  hi<|end|>\n<|assistant|> \n x<s>  y</s> z"
    tokenizer = assert_llama_cpp_agrees(folder, iter([chat, *texts()]))
    assert ids(tokenizer, "<|end|>\n\n <|user|>") == ids(tokenizer, "<|end|><|user|>")


@pytest.mark.torch
def test_vocabulary_without_scores_gives_the_ids_of_the_original(tmp_path: Path) -> None:
    """Made from tokenizer.json alone, every token of the file has one score."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False, max_token_length=8
    )
    trained.train_from_iterator([TEXT] * 3, trainer)
    content = json.loads(trained.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    original = Tokenizer.from_str(json.dumps(content))
    original.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    folder = tmp_path / "original"
    write_weights(folder, "llama", original.get_vocab_size())
    original.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    imported(folder)
    tokenizer = Tokenizer.from_file(str(tmp_path / "imported" / "tokenizer.json"))
    for text in texts(200, seed=6):
        if text:
            assert ids(tokenizer, text) == ids(original, text), text


def mistral_files(pattern: str) -> list[Path]:
    """Tokenizers that the mistral-common package carries; its other contents are not used."""
    found = sorted(Path(sys.prefix, "mistral", "mistral_common", "data").glob(pattern))
    if not found:
        pytest.skip("Mistral's tokenizers are not in this environment; `make check` puts them there")
    return found


@pytest.mark.slow
@pytest.mark.torch
def test_real_mistral_ids_equal_llama_cpp_and_the_original(tmp_path: Path) -> None:
    import sentencepiece

    found = mistral_files("*.model.*")
    for model in (found[0], found[-1]):
        folder = tmp_path / model.name.replace(".", "_") / "original"
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        write_weights(folder, "mistral", processor.vocab_size())
        shutil.copy(model, folder / "tokenizer.model")
        settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        imported(folder)
        tokenizer = assert_llama_cpp_agrees(folder, iter(["[INST] hi [/INST] you</s>", *texts()]))
        for text in texts(300, seed=6):
            if text and "<" not in text and "[" not in text:
                assert ids(tokenizer, text) == list(processor.encode(text)), (model.name, text)


@pytest.mark.slow
@pytest.mark.torch
def test_real_tekken_ids_equal_llama_cpp_and_the_original(tmp_path: Path) -> None:
    pytest.importorskip("mistral_common", reason="mistral-common changes what transformers does")
    model = mistral_files("tekken_240911.json")[0]
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    folder = tmp_path / "original"
    write_weights(folder, "mistral", 131072)
    shutil.copy(model, folder / "tekken.json")
    imported(folder)
    tokenizer = assert_llama_cpp_agrees(folder, iter(["[INST] hi [/INST] you</s>", *texts()]))
    original = Tekkenizer.from_file(model)
    for text in texts(300, seed=6):
        if "<" not in text and "[" not in text:
            assert ids(tokenizer, text) == original.encode(text, bos=False, eos=False), text
