"""Write a small tokenizer of Qwen2's kind: its way of cutting text, ChatML tokens, a template that calls tools."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from support.own_data import alpaca_rows, ranking_rows, tool_rows

# how Qwen2 cuts a text: contractions, words, single digits, signs, line ends
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN = ("<tool_call>", "</tool_call>")
_MORE = (
    "The quick brown fox, which isn't lazy, jumps over 13 dogs.\n\n\tdef f(x):\n\t\treturn x + 1\r\n"
    "中国的首都是北京。上海在东海边上，今天的天气很好！system user assistant name arguments function"
)

TEMPLATE = """\
{%- set first = messages[0] %}
{{- '<|im_start|>system\\n' }}
{{- first.content if first.role == 'system' else 'You are a small model made for tests.' }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' }}{{ message.content }}{{ '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- elif message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{ '\\n' }}{{ message.content }}{% endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{ call.function.name }}{{ '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def write_own_qwen(folder: Path) -> Path:
    """Files as Qwen2.5 has them without a tokenizer.json: vocab.json, merges.txt, settings; the same on every call."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [str(value) for row in (*alpaca_rows(), *ranking_rows(), *tool_rows()) for value in row.values()]
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([*texts, *[_MORE] * 4], trainer)
    model = json.loads(core.to_str())["model"]
    size = len(model["vocab"])
    added = {
        str(size + i): {
            **{"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False},
            "special": text in SPECIAL,
        }
        for i, text in enumerate((*SPECIAL, *PLAIN))
    }
    end, _, turn_end = range(size, size + len(SPECIAL))
    settings = {
        **{"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_prefix_space": False, "errors": "replace"},
        **{"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None},
        **{"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "clean_up_tokenization_spaces": False},
        **{"added_tokens_decoder": added, "chat_template": TEMPLATE, "model_max_length": 4096},
    }
    config = {"model_type": "qwen2", "bos_token_id": end, "eos_token_id": turn_end, "vocab_size": size + 11}
    files = {
        "vocab.json": model["vocab"],
        "tokenizer_config.json": settings,
        "config.json": config,
        "generation_config.json": {"bos_token_id": end, "pad_token_id": end, "eos_token_id": [turn_end, end]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    return folder
