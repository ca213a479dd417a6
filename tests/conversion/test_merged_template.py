"""The chat template of a merged model: in both places where readers of model folders look for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_adapters import write_peft
from support.tiny_tokenizer import CHATML, DEFAULT_SYSTEM
from support.toy_backend import write_toy_model

from macft.conversion.merged import export_merged
from macft.weights.adapters.peft import read_adapter
from macft.weights.folder import ModelFolder

QUESTION = [{"role": "user", "content": "hello"}]


def named(template: str) -> list[dict[str, str]]:
    """Several templates by name, as Command R has them."""
    return [{"name": "default", "template": template}, {"name": "tool_use", "template": "tools"}]


@pytest.mark.parametrize(
    ("settings", "base_file", "adapter_file", "expected"),
    [
        (None, CHATML, None, CHATML),  # as transformers 5 saves it
        (CHATML, None, None, CHATML),
        (CHATML, None, DEFAULT_SYSTEM, DEFAULT_SYSTEM),  # trained with a template of its own
        (CHATML, DEFAULT_SYSTEM, None, DEFAULT_SYSTEM),  # transformers takes the file
        (named(CHATML), None, DEFAULT_SYSTEM, DEFAULT_SYSTEM),
        (None, None, None, None),
    ],
)
def test_both_places_hold_the_template_that_was_trained(
    settings: Any, base_file: str | None, adapter_file: str | None, expected: str | None, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    base = write_toy_model(tmp_path / "base")
    content = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": settings}
    if settings is None:
        del content["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(content))
    adapter = write_peft(tmp_path / "adapter", base)
    for folder, template in ((base, base_file), (adapter, adapter_file)):
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    export_merged(ModelFolder("tiny", base), [read_adapter(adapter)], tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert written.pop("chat_template", None) == expected
    assert written == {key: value for key, value in content.items() if key != "chat_template"}
    theirs = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert theirs.chat_template == expected
    if expected is not None:
        without = AutoTokenizer.from_pretrained(base)
        without.chat_template = expected
        assert theirs.apply_chat_template(QUESTION) == without.apply_chat_template(QUESTION)
