"""The folder for Ollama: what stands in it, what was proven, and that nothing is left of what failed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.ollama_server import ollama
from support.tiny_tokenizer import CHATML, DEFAULT_SYSTEM, GEMMA, QWEN3

from macft.api import exports
from macft.data.templates.chat_template import ChatTemplate
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import ModelError, UsageError
from macft.ollama.client import OllamaError
from macft.ollama.detection import pad_template
from macft.ollama.export import (
    bos_text,
    check_name,
    default_name,
    end_texts,
    export_ollama,
    sampling_parameters,
)
from macft.ollama.report import OllamaReport, report_lines
from macft.ollama.ways import GO, JINJA
from macft.verify.llama_cpp import llama_cpp
from macft.verify.llama_cpp_compare import verify_gguf
from macft.verify.logits import VerifyError
from macft.weights.folder import ModelFolder

# the turn ends in a text that is no token of its own
_BRACKETS = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '[END]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def template_of(model: Path, source: str) -> ChatTemplate:
    return ChatTemplate(source, name="the test's template", special_map=load_tokenizer(model).special_map)


def exported(model: Path, output: Path, source: str = CHATML, **settings) -> OllamaReport:
    settings = {"name": "Tiny:v1", "quant": "f16", **settings}
    template = template_of(model, source)
    return export_ollama(ModelFolder("tiny", model), (), output, template=template, **settings)


def with_sampling(model: Path, folder: Path, **settings) -> Path:
    """The same model with other generation settings."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_the_folder_holds_the_file_the_modelfile_and_both_reports(model, tmp_path):
    report = exported(model, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["Modelfile", "Tiny-v1-f16.gguf", "report.json", "report.txt"]
    assert report.gguf.path == tmp_path / "out" / "Tiny-v1-f16.gguf"
    assert report.gguf.sha256 == hashlib.sha256(report.gguf.path.read_bytes()).hexdigest()
    written = (tmp_path / "out" / "Modelfile").read_text()
    assert written == f'FROM ./Tiny-v1-f16.gguf\nTEMPLATE """{report.proof.go}"""\n'
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["gguf"]["path"] == "Tiny-v1-f16.gguf" and stored["gguf"]["sha256"] == report.gguf.sha256
    assert stored["proof"]["cases"] == report.proof.cases > 300
    text = (tmp_path / "out" / "report.txt").read_text()
    assert text == "\n".join(report_lines(report)) + "\n"
    assert f"in {report.proof.cases} conversations" in text and "ollama create Tiny:v1 -f Modelfile" in text


@pytest.mark.parametrize("source", [CHATML, DEFAULT_SYSTEM, QWEN3], ids=["chatml", "default system", "qwen3"])
def test_the_embedded_template_is_out_of_ollamas_reach_and_prompts_as_trained(source, model, tmp_path):
    report = exported(model, tmp_path / "out", source)
    embedded = gguf.GGUFReader(report.gguf.path).fields["tokenizer.chat_template"].contents()
    assert embedded == pad_template(source) != source
    tokenizer = load_tokenizer(model)
    template = template_of(model, source)
    found = verify_gguf(report.gguf.path, None, quant="f16", tokenizer=tokenizer, template=template, threads=1)
    assert found.prompts == 4 and found.warnings == ()


def test_a_default_system_text_is_inside_the_template_and_there_is_no_system(model, tmp_path):
    report = exported(model, tmp_path / "out", DEFAULT_SYSTEM)
    written = (tmp_path / "out" / "Modelfile").read_text()
    assert "You are helpful." in report.proof.go and "\nSYSTEM" not in written
    assert report.request.system is None and report.request.requires is None


def test_what_cannot_be_proven_is_left_to_the_jinja_template_with_the_reason(model, tmp_path):
    dated = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
    report = exported(model, tmp_path / "out", dated)
    assert report.proof.go is None
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM ./Tiny-v1-f16.gguf\nREQUIRES 0.30.0\n"
    text = (tmp_path / "out" / "report.txt").read_text()
    assert f"prompt: no TEMPLATE: {report.proof.reason} An Ollama older than 0.30.0 cannot prompt this model" in text
    assert text.startswith(
        "prompt: Ollama 0.30.0 and newer renders the chat template in the GGUF, which was not compared"
    )


THINKS = "{# <think> </think> #}"  # by these texts Ollama sees that a template can think


def test_where_ollama_takes_the_chat_template_that_is_what_is_proven_and_said_first(model, tmp_path):
    report = exported(model, tmp_path / "out", THINKS + CHATML, in_llama_cpp=True)
    assert (report.way, report.has_choice) == (JINJA, False) and report.native.cases > 1300
    lines = report_lines(report)
    assert lines[0] == (
        "prompt: Ollama 0.30.0 and newer renders the chat template in the GGUF, which in llama.cpp gives the text of "
        f"the training in {report.native.cases} conversations"
    )
    assert (
        "prompt: an older Ollama, or one with OLLAMA_GO_TEMPLATE=1, renders the TEMPLATE, which gives the text of the "
        f"training in {report.proof.cases} conversations"
    ) in lines
    # only before a TEMPLATE does Ollama join messages of one role, and only there nothing is said of begun answers
    joins = [line for line in lines if "joins messages" in line]
    assert [line.startswith("TEMPLATE: ") for line in joins] == [True]
    [begun] = [line for line in lines if "begun" in line and not line.startswith("TEMPLATE: ")]
    assert begun.startswith(
        "chat template: For an answer that was begun: Not equal with an empty text in an assistant "
    )
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["way"] == "chat template" and stored["native"]["cases"] == report.native.cases


def test_the_command_proves_the_way_where_llama_cpp_is_installed(model, tmp_path):
    (tmp_path / "mine.jinja").write_text(THINKS + CHATML, encoding="utf-8")
    given = {"name": "tiny", "quant": "f16", "template": tmp_path / "mine.jinja"}
    proven = exports.export_ollama(model, tmp_path / "a", verify=True, **given)
    assert proven.native.cases > 1300 and proven.verification["warnings"] == ()
    assert exports.export_ollama(model, tmp_path / "b", verify=False, **given).native is None


def test_thinking_that_the_training_had_switched_off_is_off_in_llama_cpp(model, tmp_path):
    """Ollama asks for thinking wherever a template knows it: 84 of 98 prompts had none of the trained empty thought."""
    switch = "{% if add_generation_prompt and enable_thinking is not true %}<think>\n\n</think>\n\n{% endif %}"
    source = "{% set enable_thinking = enable_thinking is true %}\n" + CHATML + switch
    report = exported(model, tmp_path / "out", source, in_llama_cpp=True)
    assert report.way == JINJA and report.native.cases > 700
    assert not [limit for limit in report.native.limits if "begun" not in limit]
    embedded = gguf.GGUFReader(report.gguf.path).fields["tokenizer.chat_template"].contents()
    assert "{% set enable_thinking = macft_undefined %}\n" + source in embedded


def test_a_chat_template_that_llama_cpp_renders_otherwise_is_an_error_with_the_difference(model, tmp_path):
    source = "{{ 'tools' if tools is defined else 'none' }}" + CHATML
    with pytest.raises(VerifyError) as caught:
        exported(model, tmp_path / "out", source, in_llama_cpp=True)
    text = str(caught.value)
    assert (
        text.startswith(f"{tmp_path / 'out' / 'Tiny-v1-f16.gguf'}: llama.cpp, by which Ollama renders")
        and "\n" not in text
    )
    assert "with plain text, the template writes 'tools<|im_start|>" in text and "llama.cpp 'none<|im_start|>" in text
    assert list(tmp_path.iterdir()) == []
    # Ollama would not take the chat template here, so nothing hangs on it
    assert exported(model, tmp_path / "b", source.replace("tools", "t", 1).replace("tools", "documents")).way == GO


def test_where_go_cannot_trim_a_modelfile_without_template_is_offered_and_both_are_weighed(model, tmp_path):
    trimming = CHATML.replace("message['content']", "message['content'] | trim")
    report = exported(model, tmp_path / "out", trimming, in_llama_cpp=True)
    assert report.way == GO and report.has_choice
    written = (tmp_path / "out" / "Modelfile-0.30").read_text()
    assert written == "FROM ./Tiny-v1-f16.gguf\nREQUIRES 0.30.0\n"
    assert "TEMPLATE" in (tmp_path / "out" / "Modelfile").read_text()
    lines = report_lines(report)
    assert lines[0].startswith("prompt: Ollama renders the TEMPLATE, which gives the text of the training in ")
    assert any(line.startswith("TEMPLATE: Go cannot trim: not equal with outer") for line in lines)
    [choice] = [line for line in lines if line.startswith("choice: ")]
    assert choice.startswith(
        "choice: Modelfile-0.30 has no TEMPLATE. Ollama 0.30.0 and newer renders the chat template"
    )
    assert f"in {report.native.cases} conversations" in choice
    assert choice.endswith("But Ollama 0.14 up to 0.30 also creates a model from it, and prompts it with the bare text")
    assert not exported(model, tmp_path / "b").has_choice


def test_a_stop_is_written_only_where_no_token_ends_the_answer(model, tmp_path):
    assert exported(model, tmp_path / "a").request.parameters == ()
    report = exported(model, tmp_path / "b", _BRACKETS)
    assert report.request.parameters == (("stop", "[END]"),)
    assert 'PARAMETER stop "[END]"\n' in (tmp_path / "b" / "Modelfile").read_text()


def test_ends_for_which_the_file_has_no_place_become_stops(model, tmp_path):
    tokens = load_tokenizer(model).vocabulary
    hidden, shown, known = "<|im_start|>", "a", "<|endoftext|>"
    ends = [tokens[text] for text in ("<|im_end|>", "c", "d", known, hidden, shown)]
    source = with_sampling(model, tmp_path / "model", eos_token_id=ends)
    report = exported(source, tmp_path / "out")
    # llama.cpp stops at the first three and, by its text, at <|endoftext|>
    assert report.request.parameters == (("stop", hidden), ("stop", shown))
    [note] = [note for note in report.notes if "generation_config.json" in note]
    assert note.startswith(f"generation_config.json also ends answers at {hidden}, for which a GGUF file has no place.")
    assert (
        exported(with_sampling(model, tmp_path / "b", eos_token_id=ends[:4]), tmp_path / "c").request.parameters == ()
    )


def test_a_stop_is_a_text_in_which_llama_cpp_writes_no_control_tokens(model, tmp_path):
    """So a stop helps against a token that is not a control token, and not against one that is."""
    report = exported(model, tmp_path / "out")
    tokens = load_tokenizer(model).vocabulary
    with llama_cpp(report.gguf.path, threads=1) as server:

        def written(text: str) -> tuple[int, str]:
            always = {"n_predict": 6, "temperature": 0.0, "logit_bias": [[tokens[text], 1e6]], "stop": [text]}
            answer = server.post("/completion", {"prompt": "x", **always})
            return answer["tokens_predicted"], answer["stop_type"]

        assert written("a") == (1, "word")
        assert written("<|im_start|>") == (6, "limit")


def test_recommended_sampling_becomes_parameters(model, tmp_path):
    recommended = with_sampling(
        model, tmp_path / "model", temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, do_sample=True
    )
    report = exported(recommended, tmp_path / "out")
    lines = [
        "temperature 0.7", "top_k 20", "top_p 0.8", "repeat_penalty 1.05", "repeat_last_n -1",
    ]  # fmt: skip
    written = (tmp_path / "out" / "Modelfile").read_text()
    assert re.findall(r"^PARAMETER (.*)$", written, re.M) == lines
    assert report.request.parameters[0] == ("temperature", 0.7)


def test_a_system_text_is_written_only_if_given(model, tmp_path):
    report = exported(model, tmp_path / "out", system='Answer in "one" word.')
    assert 'SYSTEM """Answer in "one" word."""\n' in (tmp_path / "out" / "Modelfile").read_text()
    assert report.request.system == 'Answer in "one" word.'


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (GEMMA, {"system": "Be brief."}, "--system: the test's template takes no system message"),
        (CHATML, {"system": 'Say """\nhello'}, 'SYSTEM: line 1 ends with """'),
        (CHATML, {"name": "a b"}, "--name 'a b': Ollama does not accept this name"),
        (CHATML, {"quant": "q9"}, "q9"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(source, settings, message, model, tmp_path):
    with pytest.raises(UsageError) as caught:
        exported(model, tmp_path / "out", source, **settings)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_and_unchanged(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UsageError, match="exists already"):
        exported(model, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_what_the_check_finds_is_reported(model, tmp_path):
    seen = []

    def check(path: Path, name: Path) -> dict:
        seen.append(path.read_bytes()[:4])
        assert name == tmp_path / "out" / "Tiny-v1-f16.gguf"
        return {"note": "verified by hand", "warnings": ("a warning",), "answer": "Hi!"}

    report = exported(model, tmp_path / "out", check=check)
    assert seen == [b"GGUF"] and report.verification["note"] == "verified by hand"
    text = (tmp_path / "out" / "report.txt").read_text()
    assert text.startswith("warning: a warning\nprompt: ")
    assert "verification: verified by hand\nanswer: 'Hi!'\n" in text


def test_nothing_is_left_when_the_check_fails(model, tmp_path):
    def check(path: Path, name: Path) -> dict:
        assert path.is_file() and not name.exists()
        raise VerifyError(f"{name}: does not compute what its source does")

    with pytest.raises(VerifyError) as caught:
        exported(model, tmp_path / "out", check=check)
    assert str(caught.value) == f"{tmp_path / 'out' / 'Tiny-v1-f16.gguf'}: does not compute what its source does"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_by_the_name_that_the_file_would_have(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelError) as caught:
        exported(model, tmp_path / "out")
    assert str(caught.value).startswith(f"{tmp_path / 'out' / 'Tiny-v1-f16.gguf'}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", [CHATML, "{{ strftime_now('%Y') }}" + CHATML], ids=["proven", "not proven"])
def test_the_written_folder_becomes_a_model_of_ollama(source, model, tmp_path, monkeypatch):
    recommended = with_sampling(model, tmp_path / "model", temperature=0.7, top_k=20)
    report = exported(recommended, tmp_path / "out", source, system="Be brief.")
    with ollama() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        made = exports.create_in_ollama(report)
        shown = server.models["Tiny:v1"]
        assert list(server.blobs) == [f"sha256:{report.gguf.sha256}"]
    assert made.name == "Tiny:v1" and shown["system"] == "Be brief."
    assert shown["template"] == (report.proof.go or "{{ .Prompt }}")
    assert shown["requires"] == ("" if report.proof.go else "0.30.0")


def test_an_ollama_too_old_for_jinja_is_told_before_the_upload(model, tmp_path, monkeypatch):
    report = exported(model, tmp_path / "out", "{{ strftime_now('%Y') }}" + CHATML)
    with ollama(version="0.29.9") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        with pytest.raises(OllamaError, match=r"Ollama 0\.29\.9 answers, this model needs 0\.30\.0"):
            exports.create_in_ollama(report)
        assert server.blobs == {}


FIELDS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "<|im_end|>", "a"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": np.uint32(2),
    "tokenizer.ggml.eot_token_id": 1,
    "tokenizer.ggml.eom_token_id": 1,
}


def test_ends_are_the_texts_of_the_files_own_ids():
    assert end_texts(FIELDS) == ("<|im_end|>", "</s>")
    assert end_texts({}) == ()


def test_bos_is_the_text_that_llama_cpp_adds():
    assert bos_text({**FIELDS, "tokenizer.ggml.add_bos_token": True}) == "<s>"
    assert bos_text({**FIELDS, "tokenizer.ggml.add_bos_token": False}) is None
    # where the file does not say, llama.cpp adds one to a SentencePiece vocabulary alone
    assert bos_text(FIELDS) is None
    assert bos_text({**FIELDS, "tokenizer.ggml.model": "llama"}) == "<s>"


def test_sampling_numbers_are_as_short_as_they_were_written():
    fields = {"general.sampling.temp": np.float32(0.7), "general.sampling.top_k": np.int32(-1)}
    assert sampling_parameters(fields) == (("temperature", 0.7), ("top_k", -1))
    assert sampling_parameters({"general.sampling.min_p": 0.05}) == (("min_p", 0.05),)


@pytest.mark.parametrize("name", ["a", "tiny:v1", "me/tiny", "host:80/me/tiny:q4_k_m", "Qwen2.5-0.5B", "_x"])
def test_names_that_ollama_takes(name):
    check_name(name)


@pytest.mark.parametrize("name", ["", "-a", "a:", "a/", "a b", "a" * 81, "我", "a:b:c", "me.x/a/", "a\n"])
def test_names_that_ollama_refuses(name):
    with pytest.raises(UsageError, match="--name"):
        check_name(name)


def test_the_default_name_is_of_model_and_adapter():
    for name in ("org/My Model", "/models/My Model/", "x/My Model.gguf"):
        assert default_name(ModelFolder(name, Path("x")), []) == "my-model"
