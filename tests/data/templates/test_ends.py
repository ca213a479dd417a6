"""Every trained answer ends with a token, also where the chat template writes none: all templates are scanned."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.chat_templates import build, chat
from support.configs import load
from support.data_rows import encode, fit_examples, tokenize_pairs
from support.original_templates import original, original_names
from support.tiny_tokenizer import CHATML, write_tiny_model

from macft.data.formats.conversations import Example
from macft.data.formats.pairs import PairExample
from macft.data.kinds import SFT
from macft.data.templates.chat_template import ChatTemplate, load_template
from macft.data.templates.ends import AnswerEnd, end_notes, find_ends
from macft.data.templates.llamafactory import NAMED
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.errors import DataError
from macft.training.data import encoding_of, read_data

GLM = ("<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "<sop>")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
# how models write the tokens around turns
MARKERS = re.compile(r"<[|｜][^\s<>]+>|<[^\s<>]+[|｜]>|</?s>|</?(?:start|end)_of_\w+>|<eod>|\[e~\[|<\w+_of_sentence>")
# these render only contents that are lists of parts
PICTURES = ("idefics3", "smolvlm", "llava_next")


def write_model(folder: Path, *special: str, eos: str = "</s>", ends: tuple[str, ...] = ()) -> Path:
    """A tokenizer that also has the tokens `special`; generation stops at `eos` and at `ends`."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Core

    write_tiny_model(folder, CHATML, eos=eos)
    core = Core.from_file(str(folder / "tokenizer.json"))
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    core.save(str(folder / "tokenizer.json"))
    ids = [core.token_to_id(text) for text in (eos, *ends)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder


def own(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(original(name), name=name, special_map=tokenizer.special_map)


def glm(folder: Path, *ends: str) -> tuple[Tokenizer, ChatTemplate]:
    tokenizer = load_tokenizer(write_model(folder, *GLM, eos="<|endoftext|>", ends=ends))
    return tokenizer, own("glm4moe", tokenizer)


def example(*contents: str) -> Example:
    return Example(tuple(chat(*contents)), "r.jsonl:1")


def trained(given: Example, tokenizer: Tokenizer, template: ChatTemplate, **keys: Any) -> tuple[str, list[str]]:
    """The text, and its trained spans."""
    [fitted] = fit_examples([given], tokenizer, template, **{"cutoff_len": 500, **keys})
    text = fitted.rendered.text
    return text, [text[start:end] for start, end in fitted.rendered.spans]


# --- the scan


@pytest.mark.parametrize("name", [*(f"own {name}" for name in original_names()), *NAMED])
def test_every_template_trains_a_token_that_ends_the_answer(name: str, tmp_path: Path) -> None:
    if name.removeprefix("own ").removesuffix("_training") in PICTURES:
        pytest.skip("the template renders no plain text")
    source = load_template(tmp_path, {"bos_token": "<s>", "eos_token": "</s>"}, name) if name in NAMED else None
    text = (source or build(original(name.removeprefix("own ")))).render(chat("Q0", "the answer"))
    tokenizer = load_tokenizer(write_model(tmp_path, *dict.fromkeys(MARKERS.findall(text))))
    template = load_template(tmp_path, tokenizer.special_map, name) if source else own(name[4:], tokenizer)
    [fitted] = fit_examples([example("Q0", "the answer")], tokenizer, template, cutoff_len=5000)
    answer_end = fitted.rendered.text.rindex("the answer") + len("the answer")
    placed = zip(fitted.encoded.ids, fitted.encoded.ends, fitted.loss_mask, strict=True)
    assert any(id_ in tokenizer.special_ids for id_, end, is_trained in placed if is_trained and end > answer_end)
    closed = find_ends(template, tokenizer).said
    assert closed == (AnswerEnd("</s>") if name == "own glm4moe" else AnswerEnd())


# --- GLM-4.5 and later, whose template closes nothing


def test_the_next_turns_marker_ends_an_answer_where_generation_stops_at_it(tmp_path: Path) -> None:
    tokenizer, template = glm(tmp_path, "<|user|>", "<|observation|>")
    assert trained(example("Q0", "A1"), tokenizer, template) == (
        "[gMASK]<sop><|user|>\nQ0<|assistant|>\n<think></think>\nA1<|user|>",
        ["\n<think></think>\nA1<|user|>"],
    )
    text, spans = trained(example("Q0", "A1", "Q2", "A3"), tokenizer, template)
    assert spans == ["\n<think></think>\nA1<|user|>", "\n<think></think>\nA3<|user|>"]
    assert text.count("<|user|>") == 3
    assert trained(example("Q0", "A1", "Q2"), tokenizer, template)[1] == ["\n<think></think>\nA1<|user|>"]
    assert trained(example("Q0", "A1", "Q2", "A3"), tokenizer, template, mask_history=True)[1] == spans[1:]


@pytest.mark.parametrize(
    "messages",
    [
        chat("Q0", "A1"),
        chat("Q0", "A1", "Q2", "A3", system="S"),
        [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "It is 2."},
        ],
        [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    ],
    ids=["one", "two", "tool", "call"],
)
def test_tokens_and_mask_are_those_of_trls_training_template(messages: list[dict[str, Any]], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, template = glm(tmp_path, "<|user|>", "<|observation|>")
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages,
        chat_template=original("glm4moe_training"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    row = encode(SFT, [Example(tuple(messages), "r:1")], tokenizer, template, cutoff_len=500).row(0)
    assert row.tokens.tolist() == theirs["input_ids"]
    assert row.loss_mask.tolist() == [bool(value) for value in theirs["assistant_masks"]]


def test_the_models_end_token_is_added_where_generation_stops_at_no_marker(tmp_path: Path) -> None:
    tokenizer, template = glm(tmp_path)
    assert trained(example("Q0", "A1"), tokenizer, template)[1] == ["\n<think></think>\nA1<|endoftext|>"]
    assert trained(example("Q0", "A1", "Q2", "A3"), tokenizer, template)[1] == [
        "\n<think></think>\nA1",
        "\n<think></think>\nA3<|endoftext|>",
    ]
    [note] = end_notes(template, tokenizer)
    assert note.is_warning and "<|endoftext|> is added after the last one of a conversation" in note.text


def test_the_end_of_a_last_answer_that_is_marked_off_is_not_trained(tmp_path: Path) -> None:
    tokenizer, template = glm(tmp_path)
    messages = [*chat("Q0", "A1"), {"role": "user", "content": "Q2"}]
    marked = Example((*messages, {"role": "assistant", "content": "A3", "weight": 0}), "r.jsonl:1")
    text, spans = trained(marked, tokenizer, template)
    assert text.endswith("A3<|endoftext|>") and spans == ["\n<think></think>\nA1"]
    _, spans = trained(marked, tokenizer, template, train_on_prompt=True)
    assert "".join(spans) == "[gMASK]<sop><|user|>\nQ0<|assistant|>\n<think></think>\nA1<|user|>\nQ2<|assistant|>"


def test_both_answers_of_a_pair_are_ended(tmp_path: Path) -> None:
    tokenizer, template = glm(tmp_path, "<|user|>")
    question, *answers = [chat("Q0")[0], *({"role": "assistant", "content": text} for text in ("A", "B"))]
    pair = PairExample((question,), (answers[0],), (answers[1],), "r:1")
    [kept], _ = tokenize_pairs([pair], tokenizer, template, cutoff_len=500)
    [marker] = tokenizer.encode("<|user|>").ids
    for side in (kept.chosen, kept.rejected):
        assert side.tokens[-1] == marker and side.loss_mask[-1]


def test_a_row_that_fits_only_without_its_end_is_shortened(tmp_path: Path) -> None:
    tokenizer, template = glm(tmp_path, "<|user|>")
    given = example("one two three four five six seven eight nine ten", "A1")
    whole = encode(SFT, [given], tokenizer, template, cutoff_len=500).row(0)
    row = encode(SFT, [given], tokenizer, template, cutoff_len=len(whole.tokens) - 1).row(0)
    assert row.tokens[-1] == whole.tokens[-1] and np.array_equal(row.loss_mask[-3:], whole.loss_mask[-3:])


# --- what is said


def test_a_template_that_ends_answers_has_no_notes(tokenizer: Tokenizer) -> None:
    assert end_notes(build(CHATML), tokenizer) == []


def test_an_end_that_is_no_token_raises_an_alarm(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tiny_model(tmp_path))
    [note] = end_notes(build(CHATML.replace("<|im_end|>", "<|im_stop|>")), tokenizer)
    assert note.is_warning and "'<|im_stop|>', no token of this tokenizer" in note.text
    assert "the model will not learn to stop" in note.text and "\n" not in note.text
    # nothing is added to what the template writes
    stop = build(CHATML.replace("<|im_end|>", "<|im_stop|>"))
    assert trained(example("Q0", "A1"), tokenizer, stop)[1] == ["A1<|im_stop|>\n"]


def test_a_template_without_an_end_on_a_tokenizer_without_one_raises_an_alarm(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate(original("glm4moe"), name="glm4moe", special_map=tokenizer.special_map)
    [note] = end_notes(template, tokenizer)
    assert note.is_warning and "(glm4moe) writes no end after an answer, and generation stops at nothing" in note.text


def test_training_says_it_before_it_reads_the_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text(json.dumps({"messages": chat("Q0", "A1")}))
    for ends, level in (((), "WARNING"), (("<|user|>",), "INFO")):
        tokenizer, template = glm(tmp_path / level, *ends)
        caplog.clear()
        with caplog.at_level("INFO", "macft"):
            data = read_data(load(), encoding_of(load(), tokenizer, template))
        [said] = [one for one in caplog.records if "writes no end after an answer" in one.getMessage()]
        assert said.levelname == level
        [end] = tokenizer.encode(ends[0] if ends else "<|endoftext|>").ids
        assert data.train[0].tokens[-1] == end


def test_a_template_that_refuses_the_probe_is_left_to_the_rows_own_error(tokenizer: Tokenizer) -> None:
    refusing = build("{{ raise_exception('no') }}")
    assert find_ends(refusing, tokenizer).said == AnswerEnd()
    with pytest.raises(DataError, match="refuses this conversation: no"):
        Encoding(tokenizer, refusing, 10).chat.render(chat("Q0", "A1"))
