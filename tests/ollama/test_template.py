"""Go templates for Ollama: real Go writes what the chat template writes, and what cannot be proven is refused."""

from __future__ import annotations

import random
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.go_templates import go_render
from support.modelfile_parser import parse_modelfile
from support.paths import FIXTURES

from macft.data.templates.chat_template import ChatTemplate
from macft.errors import DataError
from macft.ollama import conversations, grammar
from macft.ollama.client import ModelRequest
from macft.ollama.go import go_template
from macft.ollama.modelfile import modelfile
from macft.ollama.template import Proof, needed_stops, prove_template

FOLDER = FIXTURES / "ollama_templates"
PROVEN = {
    "chatml": "<|im_end|>", "smollm2": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>",
    "mistral": "</s>", "mistral_last": "</s>", "phi3": "<|end|>", "qwen2.5": "<|im_end|>",
    "qwen3_instruct": "<|im_end|>", "llamafactory_default": "</s>", "llamafactory_alpaca": "</s>",
    "qwen3_thinking": "<|im_end|>", "llama3_dated": "<|eot_id|>",
}  # fmt: skip
TRIMMING = {"llama3", "gemma", "qwen3_thinking", "llama3_dated"}
THINKING = {"qwen3_thinking"}
WITHOUT_SYSTEM = {"gemma"}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
FRAGMENTS = [
    "hello", " ", "\n", "\t", "", "你好", "🎉", "</think>", "<think>", "{{ .Content }}", "}}", '"""', '"', "\\", "\\n",
    '{"a": [1]}', "<|im_end|>", "<|im_start|>user\n", "<s>", "</s>", "[INST]", "\u00a0", "\u200b", "\x00", "\r\n",
    "<end_of_turn>", "user", "<tool_response>x</tool_response>", "{% raw %}", "é",
]  # fmt: skip


def chat_template(source: str, name: str = "test") -> ChatTemplate:
    return ChatTemplate(source, name=name, special_map={"bos_token": "<s>", "eos_token": "</s>"})


def published(name: str) -> ChatTemplate:
    return chat_template((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), name)


def random_chats(
    count: int, *, system: bool, trimmed: bool, tagged: bool = True, seed: int = 7
) -> list[list[dict[str, Any]]]:
    """Conversations made apart from those of the proof; a last answer is not empty and ends with a letter.

    Without `tagged` no content holds tags of thoughts or tools, and none is empty.
    """
    rng = random.Random(seed)
    fragments = FRAGMENTS if tagged else [text for text in FRAGMENTS if "think" not in text and "tool" not in text]
    chats = []
    for _ in range(count):
        roles = ["system"] * (system and rng.random() < 0.5) + ["user", "assistant"] * 6
        roles = roles[: rng.randint(1 + (roles[0] == "system"), len(roles))]
        chat = [{"role": role, "content": "".join(rng.choices(fragments, k=rng.randint(0, 5)))} for role in roles]
        if chat[-1]["role"] == "assistant":
            chat[-1]["content"] += "xyzzy"
        chat = [{**m, "content": m["content"].strip()} for m in chat] if trimmed else chat
        chats.append([{**m, "content": m["content"] or ("" if tagged else "x")} for m in chat])
    return chats


def prompt(template: ChatTemplate, chat: list[dict[str, Any]]) -> str:
    """What transformers' apply_chat_template gives, with continue_final_message where an answer was begun."""
    if chat[-1]["role"] != "assistant":
        return template.render(chat, add_generation_prompt=True)
    text = template.render(chat)
    return text[: text.rindex("xyzzy") + len("xyzzy")]


def own_start(template: ChatTemplate, bos: str | None) -> str:
    """The start token, if the template writes it; contents can begin with one too."""
    return bos if bos and template.render([{"role": "user", "content": ""}]).startswith(bos) else ""


def through_a_modelfile(go: str | None) -> str:
    text = modelfile("m.gguf", ModelRequest("m", template=go))
    return dict(parse_modelfile(text))["template"]


@pytest.mark.parametrize("name", PROVEN)
@pytest.mark.parametrize("bos", [None, "<s>"])
def test_real_go_writes_the_prompts_of_published_templates(name: str, bos: str | None):
    template = published(name)
    proof = prove_template(template, bos=bos)
    assert proof.reason is None and proof.cases > 500
    chats = random_chats(300, system=name not in WITHOUT_SYSTEM, trimmed=name in TRIMMING, tagged=name not in THINKING)
    if name not in WITHOUT_SYSTEM:
        chats.append([{"role": "system", "content": "Be terse."}])
    got = go_render((through_a_modelfile(proof.go), chat) for chat in chats)
    assert got == [prompt(template, chat).removeprefix(own_start(template, bos)) for chat in chats]


@pytest.mark.parametrize("name", PROVEN)
def test_real_go_agrees_with_the_proof_on_its_own_conversations(name: str):
    template = published(name)
    proof = prove_template(template, bos=None)
    cases = list(conversations.grammar_cases(["<|im_end|>", "</s>"], system=name not in WITHOUT_SYSTEM))
    if not any("A system message after the first" in limit for limit in proof.limits):
        cases += conversations.later_system_cases()
    cases += conversations.system_alone_cases([], ()) if name not in WITHOUT_SYSTEM else []
    excluded = {*proof.excluded}
    cases = [case for case in cases if case.seldom is None or conversations.where(*case.seldom) not in excluded]
    if name in TRIMMING:
        cases = [case for case in cases if all(m["content"] == m["content"].strip() for m in case.messages)]
    got = go_render((str(proof.go), case.messages) for case in cases)
    assert got == [grammar.expected(template, case.messages) for case in cases]
    assert len(got) > 300


@pytest.mark.slow
def test_real_go_agrees_on_the_templates_that_trl_carries():
    spec = find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("trl, whose chat templates this reads, is not installed (pip install trl)")
    paths = sorted((Path(next(iter(spec.submodule_search_locations))) / "chat_templates").glob("*.jinja"))
    paths = [path for path in paths if not path.stem.endswith("_training")]
    jobs, want, refused = [], [], []
    for path in paths:
        template = chat_template(path.read_text(encoding="utf-8"), path.name)
        proof = prove_template(template, bos="<s>")
        assert (proof.go is None) != (proof.reason is None)
        refused += [path.stem] * (proof.go is None)
        if proof.go is not None:
            trims = any("cannot trim" in limit for limit in proof.limits)
            tagged = all("white space" in kind for kind in proof.excluded)
            for chat in random_chats(15, system=proof.takes_system, trimmed=trims, tagged=tagged):
                jobs.append((proof.go, chat))
                want.append(prompt(template, chat).removeprefix(own_start(template, "<s>")))
    assert go_render(jobs) == want
    assert len(jobs) >= 15 * 30
    assert refused == ["idefics3", "llava_next", "smolvlm"]  # their contents are lists


def test_real_go_reads_every_grammar_as_it_is_meant():
    rng = random.Random(3)
    texts = ["", "a", "b\n", '"{{', "}}\\", "\u00a0\u200b", '"""\n', "c", "<|x|>", "\U000e0041x"]
    jobs, want = [], []
    for _ in range(80):
        contexts = [
            grammar.Context(system, before, role, left)
            for system in (grammar.NONE, grammar.EMPTY, grammar.GIVEN)
            for before in ("", "user", "assistant", "system")
            for role, lefts in (("user", "123"), ("assistant", "123"), ("system", "123"), ("end", "0"))
            for left in map(int, lefts)
        ]
        # from a few texts, by only some of the circumstances, so that questions can be left out
        plural = [rng.random() < 0.5 for _ in range(3)]
        table: dict[Any, tuple[str, ...]] = {}
        known: dict[grammar.Context, tuple[str, ...]] = {}
        for c in contexts:
            places = (c.system, c.before, c.left)
            key = (c.role, *(place for place, counts in zip(places, plural, strict=True) if counts))
            piece = table.setdefault(key, tuple(rng.choices(texts, k=rng.choice((1, 1, 2)))))
            known[c] = ("".join(piece),) if c.system == grammar.NONE else piece
        cases = [*conversations.answer_first_cases(system=True), *conversations.later_system_cases()]
        cases += conversations.random_cases(10, texts, system=True, without=())
        go = go_template(known, bos=None)
        for case in rng.sample(cases, 40):
            jobs.append((go, case.messages))
            want.append(grammar.render(known, case.messages))
    assert go_render(jobs) == want


def test_the_default_system_prompt_stays_and_gives_way_to_a_given_one():
    proof = prove_template(published("smollm2"), bos=None)
    user = {"role": "user", "content": "hi"}
    default, given = go_render(
        (str(proof.go), chat) for chat in ([user], [{"role": "system", "content": "Be terse."}, user])
    )
    named = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    tail = "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert default == f"<|im_start|>system\n{named}{tail}"
    assert given == f"<|im_start|>system\nBe terse.{tail}"


def test_neighbors_of_one_role_reach_the_template_as_one():
    proof = prove_template(published("chatml"), bos=None)
    apart = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    joined = [{"role": "user", "content": "a\n\nb"}]
    assert go_render([(str(proof.go), apart)]) == [published("chatml").render(joined, add_generation_prompt=True)]
    assert any("joins messages of one role" in limit for limit in proof.limits)


def test_a_conversation_cut_at_its_start_is_still_well_formed():
    proof = prove_template(published("mistral"), bos=None)
    answer = {"role": "assistant", "content": "b"}
    question = {"role": "user", "content": "c"}
    got = go_render([(str(proof.go), [answer, question])])
    assert got == go_render([(str(proof.go), [{"role": "user", "content": ""}, answer, question])])
    assert got == ["<s>[INST]  [/INST] b</s>[INST] c [/INST]"]
    assert any("as if an empty question came first" in limit for limit in proof.limits)


@pytest.mark.parametrize(("name", "stop"), PROVEN.items())
def test_stops_are_the_end_tokens_that_llama_cpp_does_not_know(name: str, stop: str):
    proof = prove_template(published(name), bos=None)
    assert proof.stops == (stop,)
    assert needed_stops(proof, {stop}) == ()
    assert needed_stops(proof, {"<|endoftext|>"}) == (stop,)


def test_role_words_are_no_stops():
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    proof = prove_template(chat_template(turns + "{% if add_generation_prompt %}assistant: {% endif %}"), bos=None)
    assert proof.stops == ()
    assert "No special token ends an answer" in limits(proof)
    later = CHATML.replace("<|im_end|>", " (over)<|im_end|>") + PROMPT
    assert prove_template(chat_template(later), bos=None).stops == ()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% set d = '%Y' %}{{ strftime_now(d) }}" + CHATML + PROMPT, "The template writes the time"),
        ("{{ strftime_now('%Y-%m-%d %H:%M') }}" + CHATML + PROMPT, "The template writes the time"),
        (CHATML.replace("{{ m.role }}", "{{ loop.index }}") + PROMPT, "depends on more than the roles"),
        (CHATML.replace("m.content", "m.content | upper") + PROMPT, "does not write the content of a user message"),
        (CHATML.replace("m.content", "m.content * 2") + PROMPT, "does not write the content of a user message once"),
        (CHATML.replace("m.content", "m.content | replace('``', '')") + PROMPT, "With several lines in a user message"),
        (CHATML.replace("m.content", "m.content | replace('<b>', '')") + PROMPT, "With tags in a user message"),
        (
            CHATML + "{{ messages[-1].content if messages[-1].role == 'assistant' }}" + PROMPT,
            "the last answer exactly once",
        ),
        # beyond the lengths that the derivation saw
        (CHATML.replace("{{ m.role }}", "{{ m.role }}{{ '!' if loop.index == 11 }}") + PROMPT, "With plain text"),
        ("{{ raise_exception('only for tools') }}", "refuses this conversation: only for tools"),
        (CHATML.replace("m.content", "m.content[0].text") + PROMPT, "does not write the content of a user message"),
    ],
)
def test_what_is_not_proven_is_refused_with_its_reason(source: str, reason: str):
    proof = prove_template(chat_template(source), bos=None)
    assert proof.go is None
    assert reason in str(proof.reason)
    assert str(proof.reason).endswith(".") and "\n" not in str(proof.reason)


def limits(proof: Proof) -> str:
    assert proof.go is not None
    assert all(limit[0].isupper() and limit.endswith(".") for limit in proof.limits)
    return " ".join(proof.limits)


def test_limits_say_what_is_not_covered():
    for name in PROVEN:
        proof = prove_template(published(name), bos=None)
        assert ("cannot trim" in limits(proof)) == (name in TRIMMING)
        assert proof.takes_system == (name not in WITHOUT_SYSTEM)
    assert "System role not supported" in limits(prove_template(published("gemma"), bos=None))
    silent = (
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    )
    proof = prove_template(chat_template(silent.replace("<|assistant|>", "{{ '' }}")), bos=None)
    assert "leaves system messages out" in limits(proof) and not proof.takes_system


def test_contents_that_plain_chat_seldom_has_are_left_out_of_the_proof_by_name():
    proof = prove_template(published("qwen3_thinking"), bos=None)
    assert proof.cases > 1000 and [kind for kind in proof.excluded if "white space" not in kind] == [
        "<think> or </think> in an assistant message",
        "the template's own tags in an assistant message",
    ]
    assert (
        "Not equal with <think> or </think> in an assistant message, the template writes "
        r"'t\n<think>\nno\n</think>\n\nyes' and the TEMPLATE 't\n<think>\n\n</think>\n\nno</think'." in limits(proof)
    )
    empty = chat_template(CHATML.replace("{{ m.content", "{{ m.content or '-'") + PROMPT)
    assert set(prove_template(empty, bos=None).excluded) == {
        "an empty text in a user message",
        "an empty text in an assistant message",
    }


def test_a_date_is_held_and_told():
    proof = prove_template(published("llama3_dated"), bos=None)
    today = datetime.now().strftime("%d %b %Y")
    assert proof.date == today and f"Today Date: {today}" in str(proof.go)
    assert f"The date in the TEMPLATE stays {today}, where the chat template writes today's." in limits(proof)
    unread = "{% set date = strftime_now('%Y') %}" + CHATML + PROMPT
    assert prove_template(chat_template(unread), bos=None).date is None


def test_a_system_message_alone_is_written_as_the_template_does_or_before_an_empty_question():
    alone = [{"role": "system", "content": "Be terse."}]
    chatml = prove_template(published("chatml"), bos=None)
    assert go_render([(str(chatml.go), alone)]) == ["<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>assistant\n"]
    assert "system message alone" not in limits(chatml)
    strict = (
        "{% if messages | length == 1 and messages[0].role == 'system' %}{{ raise_exception('no user') }}{% endif %}"
    )
    refusing = prove_template(chat_template(strict + CHATML + PROMPT), bos=None)
    empty = "<|im_start|>user\n<|im_end|>\n"
    assert go_render([(str(refusing.go), alone)]) == [
        f"<|im_start|>system\nBe terse.<|im_end|>\n{empty}<|im_start|>assistant\n"
    ]
    assert "A system message alone is written as if an empty question followed it." in limits(refusing)


def test_a_start_token_that_the_template_does_not_write_is_told():
    assert "Before every prompt llama.cpp puts <s>" in limits(prove_template(published("chatml"), bos="<s>"))
    assert "llama.cpp puts" not in limits(prove_template(published("llama3"), bos="<s>"))
    assert "<s>" not in str(prove_template(published("llama3"), bos="<s>").go)


def test_expected_is_the_text_up_to_where_an_answer_goes_on():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]
    assert grammar.expected(published("llama3"), chat).endswith("<|end_header_id|>\n\nb ")
    with pytest.raises(DataError):
        grammar.expected(published("gemma"), [{"role": "system", "content": "s"}, *chat])
