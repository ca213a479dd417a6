"""What PEFT's settings put into an adapter's file beside LoRA: merged as PEFT computes it, or refused with a way out.

PEFT's own merge_and_unload is no oracle for a shared embedding: it adds to one matrix what was trained on one of its
two uses.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from support.peft_shapes import BASES, HALF, MORE, SHAPES, Shape, logits_of, resized, save, write_bases
from support.tiny_adapters import write_word_tokenizer
from support.tiny_models import VOCABULARY
from transformers import AutoModelForCausalLM

import macft
from macft.conversion.adapter import convert_adapter
from macft.conversion.merged import MergeReport, export_merged
from macft.errors import ModelError
from macft.verify.logits import EXACT, Subject, VerifyError
from macft.verify.logits import verify as compare
from macft.weights.adapters.peft import read_adapter
from macft.weights.folder import ModelFolder

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("small_threads")]

# float32 sums in another order: logits here are of the order of 10
CLOSE = 1e-4
TIED = ("tied", "scaled")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


def merge(base: Path, adapter: Path, to: Path, **options) -> MergeReport:
    return export_merged(ModelFolder("base", base), [read_adapter(adapter, with_saved=True)], to, **options)


def merged_logits(folder: Path, more: int) -> np.ndarray:
    return logits_of(AutoModelForCausalLM.from_pretrained(folder), more)


@pytest.mark.parametrize(
    ("base", "name"),
    [*((base, name) for base in BASES for name in SHAPES), *((base, name) for base in TIED for name in HALF)],
)
def test_the_merged_model_computes_what_peft_does_on_the_resized_base(base, name, bases, tmp_path):
    shape, is_tied = {**SHAPES, **HALF}[name], base in TIED
    expected = save(bases[base], shape, tmp_path / "adapter")
    assert np.abs(expected - logits_of(resized(bases[base], shape.more), shape.more)).max() > 0.1
    merge(bases[base], tmp_path / "adapter", tmp_path / "merged")
    assert np.abs(merged_logits(tmp_path / "merged", shape.more) - expected).max() < CLOSE
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == VOCABULARY + shape.more
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" not in stored) == (is_tied and shape.stays_tied) == config["tie_word_embeddings"]
    own = tmp_path / "adapter" if shape.more else bases[base]
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", HALF)
def test_rows_that_the_adapter_lacks_are_named_and_the_resized_base_has_them(name, bases, tmp_path):
    model = resized(bases["untied"], MORE)
    model.save_pretrained(tmp_path / "resized")
    write_word_tokenizer(tmp_path / "resized", VOCABULARY + MORE)
    expected = save(tmp_path / "resized", Shape(HALF[name].settings), tmp_path / "adapter")
    write_word_tokenizer(tmp_path / "adapter", VOCABULARY + MORE)
    lacks = "lm_head.weight" if "embedding" in name else "model.embed_tokens.weight"
    with pytest.raises(ModelError, match=f"with {VOCABULARY + MORE} rows") as error:
        merge(bases["untied"], tmp_path / "adapter", tmp_path / "merged")
    assert f"  {lacks} has {VOCABULARY} rows in the model and is not in the adapter" in str(
        error.value
    ) and "name as the base the model as it was" in str(error.value)
    assert not (tmp_path / "merged").exists()
    merge(tmp_path / "resized", tmp_path / "adapter", tmp_path / "merged")
    assert np.abs(merged_logits(tmp_path / "merged", 0) - expected).max() < CLOSE


@pytest.mark.parametrize("count", [None, VOCABULARY + MORE + 1])
def test_new_rows_without_the_tokenizer_that_names_them_are_refused(count, bases, tmp_path):
    expected = save(bases["tied"], SHAPES["grown, not trained"], tmp_path / "adapter")
    if count is None:
        (tmp_path / "adapter" / "tokenizer.json").unlink()
    else:
        write_word_tokenizer(tmp_path / "adapter", count)
    found = "no tokenizer.json" if count is None else f"a tokenizer with token {VOCABULARY + MORE}"
    with pytest.raises(ModelError, match=f"holds {found}; copy the tokenizer"):
        merge(bases["tied"], tmp_path / "adapter", tmp_path / "merged")
    write_word_tokenizer(tmp_path / "adapter", VOCABULARY + MORE)
    merge(bases["tied"], tmp_path / "adapter", tmp_path / "merged")
    assert np.abs(merged_logits(tmp_path / "merged", MORE) - expected).max() < CLOSE


def test_a_tokenizer_that_adds_tokens_where_the_base_has_rows_to_spare_is_taken(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases["untied"], base)
    write_word_tokenizer(base, VOCABULARY - 9)
    for count, taken in {VOCABULARY: True, VOCABULARY + 1: False, VOCABULARY - 10: False}.items():
        save(base, Shape(), tmp_path / f"{count}")
        write_word_tokenizer(tmp_path / f"{count}", count)
        merge(base, tmp_path / f"{count}", tmp_path / f"merged-{count}")
        found = (tmp_path / f"merged-{count}" / "tokenizer.json").read_bytes()
        assert found == ((tmp_path / f"{count}" if taken else base) / "tokenizer.json").read_bytes()


def test_an_embedding_and_a_head_that_differ_do_not_fit_a_model_that_ties_them(bases, tmp_path):
    save(bases["untied"], SHAPES["grown, not trained"], tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"an embedding and a head that differ.*name the model that it was trained on"):
        merge(bases["tied"], tmp_path / "adapter", tmp_path / "merged")


def test_a_copy_that_differs_from_the_base_is_what_was_trained(bases, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(
        resized(bases["untied"], 0), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge(bases["untied"], tmp_path / "adapter", tmp_path / "merged")
    assert np.abs(merged_logits(tmp_path / "merged", 0) - logits_of(model, 0)).max() < CLOSE


def test_trained_tokens_that_do_not_fit_are_refused(bases, tmp_path):
    save(bases["untied"], Shape({"trainable_token_indices": [5]}), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": [5, 6]}))
    with pytest.raises(ModelError, match="1 rows were trained, trainable_token_indices names 2"):
        merge(bases["untied"], tmp_path / "adapter", tmp_path / "merged")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": [VOCABULARY]}))
    with pytest.raises(ModelError, match=rf"rows of tokens \[{VOCABULARY}\], the model has \[{VOCABULARY}, 64\]"):
        merge(bases["untied"], tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("layout", ["hf", "mlx"])
def test_a_grown_vocabulary_is_merged_and_quantized_in_the_mlx_layout(layout, bases, tmp_path):
    expected = save(bases["tied"], SHAPES["grown, new tokens"], tmp_path / "adapter")
    report = merge(
        bases["tied"], tmp_path / "adapter", tmp_path / "merged", layout=layout, bits=8 if layout == "mlx" else None
    )
    assert any(f"{VOCABULARY + MORE} rows" in note for note in report.notes)
    if layout == "mlx":
        assert load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"].shape == (203, 16)
    else:
        assert np.abs(merged_logits(tmp_path / "merged", MORE) - expected).max() < CLOSE


@pytest.mark.parametrize("names", [["grown, saved and tied"], ["tying, lora on the embedding", "tokens of the head"]])
def test_verifying_compares_with_peft_on_the_resized_base_and_each_use_of_a_shared_matrix(names, bases, tmp_path):
    for index, name in enumerate(names):
        save(bases["tied"], SHAPES[name], tmp_path / f"{index}")
    adapters = [tmp_path / f"{index}" for index in range(len(names))]
    macft.export_merged(bases["tied"], tmp_path / "merged", adapters=adapters, verify=True)
    # it can fail: without the last adapter the logits differ
    with pytest.raises(VerifyError):
        compare(
            Subject(bases["tied"], tuple(read_adapter(f, with_saved=True) for f in adapters)),
            Subject(bases["tied"]),
            EXACT,
        )


# --- starts that change the base


def trained(base: Path, folder: Path, init: str | bool, first: Path | None = None) -> np.ndarray:
    """Write an adapter with this start, or with a folder `first` for the start the plain LoRA that PEFT makes of it."""
    torch.manual_seed(2)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=init)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    if first is not None:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(first)
        model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(first) if first is not None else None)
    return logits_of(model, 0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_peft_repeats_is_refused_and_merging_with_peft_is_right(init, bases, tmp_path):
    expected = trained(bases["untied"], tmp_path / "adapter", init)
    with pytest.raises(ModelError, match=f"init_lora_weights is '{init}'.*merge the adapter with PEFT"):
        merge(bases["untied"], tmp_path / "adapter", tmp_path / "merged")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["untied"]), tmp_path / "adapter")
    assert np.abs(logits_of(theirs.merge_and_unload(), 0) - expected).max() < CLOSE


def test_a_start_that_nobody_can_repeat_is_refused_and_its_conversion_is_right(bases, tmp_path):
    trained(bases["untied"], tmp_path / "adapter", "pissa_niter_4")
    with pytest.raises(ModelError, match=r"pissa_niter_4.*path_initial_model_for_weight_conversion"):
        merge(bases["untied"], tmp_path / "adapter", tmp_path / "merged")
    expected = trained(bases["untied"], tmp_path / "converted", "pissa_niter_4", tmp_path / "first")
    merge(bases["untied"], tmp_path / "converted", tmp_path / "merged")
    assert np.abs(merged_logits(tmp_path / "merged", 0) - expected).max() < CLOSE


@pytest.mark.parametrize("init", ["corda", "lora_ga", "CorDA"])
def test_starts_on_data_are_refused(init, bases, tmp_path):
    trained(bases["untied"], tmp_path / "adapter", True)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(ModelError, match=r"path_initial_model_for_weight_conversion.*take the changed base"):
        merge(bases["untied"], tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("name", ["grown, both saved", "grown, saved and tied", "grown, new tokens"])
def test_for_mlx_lm_a_grown_vocabulary_has_the_way_out_with_and_without_its_base(name, bases, tmp_path):
    base = bases["tied"]
    save(base, {**SHAPES, **HALF}[name], tmp_path / "adapter")
    for model in (None, ModelFolder("base", base)):
        with pytest.raises(ModelError) as refusal:
            convert_adapter(tmp_path / "adapter", tmp_path / "mlx", "mlx", model)
        assert str(refusal.value).startswith(
            f"{tmp_path / 'adapter'}: mlx-lm cannot represent this adapter; merge it instead: macft export merged BASE "
        )
        assert not (tmp_path / "mlx").exists()
