"""Tokenizer: ids and offsets against transformers, folders of both layouts, end tokens, files kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.data_folders import own_and_public_qwen
from support.tiny_tokenizer import SPECIAL, write_tiny_model

from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import ModelError

TEXTS = (
    "Hello, world!  It's 2024, isn't it?\n\n  indented\tand\r\nWindows   ",
    "你好，世界！今天是星期六。𠮷野家 café",
    "cafe\u0301 A\u030angstro\u0308m \u1100\u1161\u11a8",
    "emoji 👩‍👩‍👧 and 🇨🇳, Ångström, é and 각",
    "<|im_start|>user\nhi<|im_end|>\n<tool_call>{}</tool_call><|endoftext|>x",
    "",
    " ",
    "\u2028\u00a0\ufeffx",
)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers(tmp_path: Path, text: str) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = write_tiny_model(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode(text).ids == theirs.encode(text, add_special_tokens=False)


@own_and_public_qwen
def test_qwen_without_tokenizer_json_equals_transformers(qwen: Path, data_folder: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(qwen), AutoTokenizer.from_pretrained(qwen)
    rows = json.loads((data_folder / "alpaca_zh_demo.json").read_text(encoding="utf-8"))[:200]
    for text in [*TEXTS, *(row["output"] for row in rows)]:
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    vocab = json.loads((qwen / "vocab.json").read_text(encoding="utf-8"))
    settings = json.loads((qwen / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert ours.vocab_size == len(theirs) == len(vocab) + len(settings["added_tokens_decoder"])
    # generation_config.json names both
    assert ours.eos_ids == {len(vocab), len(vocab) + 2} == set(ours.encode("<|endoftext|><|im_end|>").ids)
    # only those flagged special: <tool_call> is an added token of plain text
    assert "<|im_end|>" in ours.special_strings and "<tool_call>" not in ours.special_strings


def test_gpt2_files_without_tokenizer_json_equal_transformers(tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer

    model = json.loads((write_tiny_model(tmp_path / "json") / "tokenizer.json").read_text())["model"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    vocab = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_tokenizer(folder), GPT2Tokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False)
    assert ours.eos_ids == {len(vocab) - 1} and ours.special_strings == ("<|endoftext|>",)


def test_ends_are_characters_and_cover_the_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tiny_model(tmp_path))
    for text in TEXTS:
        encoded = tokenizer.encode(text)
        assert encoded.ends == sorted(encoded.ends)
        assert (encoded.ends or [0])[-1] == len(text)
        start = 0
        for id_, end in zip(encoded.ids, encoded.ends, strict=True):
            piece = tokenizer.decode([id_], skip_special=False)
            assert "\ufffd" in piece or piece == text[start:end]
            start = end


def test_bytes_of_one_character_all_end_after_it(tmp_path: Path) -> None:
    encoded = load_tokenizer(write_tiny_model(tmp_path)).encode("a𠮷b")
    assert encoded.ends == [1, 2, 2, 2, 2, 3]


def test_trailing_blanks_belong_to_their_token(tmp_path: Path) -> None:
    # a byte-level post-processor reports 'end=0' for the run of blanks here
    assert load_tokenizer(write_tiny_model(tmp_path)).encode("   ").ends[-1] == 3


def test_batch_equals_one_by_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tiny_model(tmp_path))
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_truncation_stored_in_the_file_is_off(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {
        **{"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
    }
    expected = load_tokenizer(folder).encode("hello, how are you").ids
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    assert load_tokenizer(folder).encode("hello, how are you").ids == expected and 3 < len(expected) < 64


def test_eos_ids_are_the_union_of_all_files(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, eos="<|im_end|>")
    (folder / "config.json").write_text('{"eos_token_id": 3, "text_config": {"eos_token_id": 7}}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    tokenizer = load_tokenizer(folder)
    [im_end] = tokenizer.encode("<|im_end|>").ids
    assert tokenizer.eos_ids == {3, 4, 5, 7, im_end}
    assert tokenizer.special_map["eos_token"] == "<|im_end|>"
    assert tokenizer.special_strings == SPECIAL


def test_tokens_only_in_added_tokens_decoder_are_added(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    size = load_tokenizer(folder).vocab_size
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {str(size): {"content": "<new>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(folder).encode("a<new>b").ids[1] == size

    settings["added_tokens_decoder"] = {str(size + 5): {"content": "<new>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=f"'<new>' got id {size}, tokenizer_config.json says {size + 5}"):
        load_tokenizer(folder)


def test_an_end_token_that_is_a_plain_word_becomes_special(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write_tiny_model(tmp_path, eos="assistant")
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "xassistanty <|im_end|>"
    assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False)
    assert ours.eos_ids <= ours.special_ids and "assistant" in ours.special_strings


def test_saved_files_are_the_files_read(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "a")
    tokenizer = load_tokenizer(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    tokenizer.save(tmp_path / "b")
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before
    assert load_tokenizer(tmp_path / "b").encode("hello").ids == tokenizer.encode("hello").ids


def test_missing_files_are_named_with_their_place(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        load_tokenizer(tmp_path)
    message = str(error.value)
    assert str(tmp_path) in message and "tokenizer.json" in message and "merges.txt" in message
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "no"),
        ("tokenizer_config.json", "[1]"),
        ("config.json", "{"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, name: str, content: str) -> None:
    folder = write_tiny_model(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(ModelError) as error:
        load_tokenizer(folder)
    assert str(folder / name) in str(error.value) and "\n" not in str(error.value)


def test_a_fork_after_a_batch_prints_no_warning(tmp_path: Path) -> None:
    # tokenizers 0.22 warns unless told whether to use all cores; 0.23 never does
    folder = write_tiny_model(tmp_path)
    script = (
        "import os, sys; from pathlib import Path; from macft.data.tokenization.tokenizer import load_tokenizer\n"
        "load_tokenizer(Path(sys.argv[1])).encode_batch(['hello there'] * 2000)\n"
        "pid = os.fork()\n"
        "os._exit(0) if pid == 0 else os.waitpid(pid, 0)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


def test_loading_needs_no_framework(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'mlx', 'mlx_lm', 'transformers', 'peft'): sys.modules[name] = None\n"
        "from pathlib import Path; from macft.data.tokenization.tokenizer import load_tokenizer\n"
        "import macft.inspection.preview\n"
        "print(load_tokenizer(Path(sys.argv[1])).vocab_size)"
    )
    folder = write_tiny_model(tmp_path)
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == load_tokenizer(folder).vocab_size
