"""An adapter on another model than its own: a warning where names or hashes differ, an error where tokens do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.commands import macft
from support.refused_runs import message_of, written
from support.toy_backend import write_toy_model

from macft.errors import ModelError
from macft.weights.adapters.base_model import other_base_note
from macft.weights.adapters.mlx_lm import write_mlx_adapter
from macft.weights.adapters.peft import read_adapter, write_adapter
from macft.weights.folder import ModelFolder

pytestmark = pytest.mark.usefixtures("small_threads")

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def foreign(adapter: Path, folder: Path, base: str, *, mlx: bool = False, tokenizer: Path | None = None) -> Path:
    """The adapter as PEFT or mlx-lm saves it: without the base's hash, with a tokenizer where a trainer added one."""
    folder.mkdir(parents=True)
    read = read_adapter(adapter)
    config = replace(read.config, base=base)
    if mlx:
        write_mlx_adapter(folder, replace(read, config=config, base_hash=None))
    else:
        write_adapter(folder, config, read.state, None)
    for name in TOKENIZER if tokenizer is not None else ():
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder)
    return folder


def renamed_tokens(model: Path, folder: Path) -> Path:
    """The model with the tokens 20 and 21 changing places, so that all shapes agree."""
    shutil.copytree(model, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = (next(text for text, id_ in vocabulary.items() if id_ == wanted) for wanted in (20, 21))
    vocabulary[first], vocabulary[second] = 21, 20
    path.write_text(json.dumps(content))
    return folder


def commands(base: Path, adapter: Path, folder: Path, data: Path, pairs: Path) -> dict[str, tuple[object, ...]]:
    prompts = folder / "prompts.txt"
    prompts.write_text("hello\n")
    run = (f"model_name_or_path={base}", f"output_dir={folder / 'run'}", "max_steps=1", "plot_loss=false")
    start = f"adapter_name_or_path={adapter}"
    reference = (f"dataset={pairs}", "stage=dpo", "finetuning_type=full", f"ref_model={base}")
    out = (folder / "out", folder / "out.gguf")
    # of PEFT into mlx-lm's, or the reverse
    other = "peft" if (adapter / "adapters.safetensors").exists() else "mlx"
    return {
        "chat": ("chat", base, "--adapter", adapter, "--prompt", "hello", "--max-new-tokens", "1"),
        "compare": ("compare", base, "--adapter", adapter, "--prompts", prompts, "--max-new-tokens", "1"),
        "train": ("train", *run, f"dataset={data}", start),
        "train a new one": ("train", *run, f"dataset={data}", start, "create_new_adapter=true"),
        "reference": ("train", *run, *reference, f"ref_model_adapters={adapter}"),
        "merged": ("export", "merged", base, "--adapter", adapter, "--output", out[0]),
        "gguf": ("export", "gguf", base, "--adapter", adapter, "--output", out[1], "--quant", "f32", "--no-verify"),
        "lora": ("export", "gguf", base, "--adapter", adapter, "--output", out[1], "--adapter-only"),
        "ollama": ("export", "ollama", base, "--adapter", adapter, "--output", out[0], "--no-verify"),
        "convert": ("convert", "adapter", adapter, out[0], "--to", other, "--base", base),
    }


NAMES = list(commands(Path("b"), Path("a"), Path("/tmp"), Path("d"), Path("p")))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same shapes and the same tokens as `model`, with other numbers."""
    return write_toy_model(tmp_path_factory.mktemp("other") / "other", seed=9)


@pytest.mark.parametrize("form", ["peft", "mlx"])
@pytest.mark.parametrize("command", NAMES)
def test_every_command_warns_once_of_a_base_of_another_name(command, form, other, adapter, data, pair_data, tmp_path):
    odd = foreign(adapter, tmp_path / "adapter", "org/their-model", mlx=form == "mlx")
    result = macft(*commands(other, odd, tmp_path, data, pair_data)[command])
    assert result.code == 0, result.err
    said = result.out + result.err  # what a report holds is printed with it
    assert said.count(f"{odd} names org/their-model as its base, not {other}") == 1, said


@pytest.mark.parametrize("command", NAMES)
def test_every_command_refuses_a_base_with_other_tokens(command, model, adapter, data, pair_data, tmp_path):
    odd = foreign(adapter, tmp_path / "adapter", "org/their-model", tokenizer=model)
    base = renamed_tokens(model, tmp_path / "model")
    called = commands(base, odd, tmp_path, data, pair_data)[command]
    before = written(tmp_path)
    message = message_of(macft(*called), 1)
    assert message.startswith(
        f"{odd}: made for a model with another vocabulary than {base}: 2 tokens differ, the first is 20, "
    )
    assert message.endswith("; name the model that it was trained on (org/their-model)")
    assert written(tmp_path) == before


@pytest.mark.parametrize(
    ("named", "is_same"),
    [
        ("org/small-model", True),
        ("another-org/Small-Model", True),
        ("/somewhere/else/small-model/", True),
        ("C:\\models\\small-model", True),
        ("/root/.cache/huggingface/hub/models--org--small-model/snapshots/0123abc", True),
        ("", True),
        ("org/small-model-instruct", False),
        ("org/model", False),
        ("/root/.cache/huggingface/hub/models--org--model/snapshots/0123abc", False),
    ],
)
def test_a_model_has_one_name_whatever_hub_folder_or_cache_it_is_in(named, is_same, model, adapter, tmp_path):
    odd = read_adapter(foreign(adapter, tmp_path / "adapter", named))
    places = (tmp_path / "small-model", tmp_path / "hub" / "models--org--small-model" / "snapshots" / "abc")
    for place in places:
        base = shutil.copytree(model, place)
        assert (other_base_note(odd, ModelFolder(str(base), base)) is None) is is_same
        assert (other_base_note(odd, ModelFolder("org/small-model", base)) is None) is is_same


def test_weights_that_are_here_say_more_than_names(model, other, adapter, tmp_path):
    same = shutil.copytree(model, tmp_path / "copy")
    ours = read_adapter(adapter)  # with the hash of `model`
    theirs = read_adapter(foreign(adapter, tmp_path / "adapter", str(model)))
    for odd in (ours, theirs, replace(ours, config=replace(ours.config, base="org/unknown"))):
        assert other_base_note(odd, ModelFolder(str(same), same)) is None
    for odd in (ours, theirs):
        # the same name, other numbers
        twin = shutil.copytree(other, tmp_path / odd.folder.name / "model")
        note = other_base_note(odd, ModelFolder(str(twin), twin))
        assert note == (
            f"{odd.folder} was trained on {model}, whose weight files differ from those of {twin}: right where one is "
            "the other converted, else its answers mean nothing"
        )


def test_a_named_base_that_is_no_longer_whole_is_only_a_name(model, adapter, tmp_path):
    broken = shutil.copytree(model, tmp_path / "base")
    odd = read_adapter(foreign(adapter, tmp_path / "adapter", str(broken)))
    (broken / "model.safetensors").write_bytes(b"")
    assert "names" in (other_base_note(odd, ModelFolder(str(model), model)) or "")
    shutil.rmtree(broken)
    assert "names" in (other_base_note(odd, ModelFolder(str(model), model)) or "")


def test_the_tokens_of_the_named_base_count_where_the_adapter_has_none(model, adapter, tmp_path):
    odd = read_adapter(foreign(adapter, tmp_path / "adapter", str(model)))
    base = renamed_tokens(write_toy_model(tmp_path / "new", seed=3), tmp_path / "model")
    with pytest.raises(ModelError, match=r"another vocabulary than .*: 2 tokens differ, the first is 20, "):
        other_base_note(odd, ModelFolder(str(base), base))


def test_tokens_that_only_one_of_them_has_contradict_nothing(model, adapter, tmp_path):
    """Training often adds a padding token; a base may name rows that nothing uses."""
    grown = shutil.copytree(model, tmp_path / "grown")
    content = json.loads((grown / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 100_000, "content": "<pad>"})
    (grown / "tokenizer.json").write_text(json.dumps(content))
    more = read_adapter(foreign(adapter, tmp_path / "a", "model", tokenizer=grown))
    fewer = read_adapter(foreign(adapter, tmp_path / "b", "grown", tokenizer=model))
    assert other_base_note(more, ModelFolder(str(model), model)) is None
    assert other_base_note(fewer, ModelFolder(str(grown), grown)) is None
