"""Write tokenizer.json files of every kind, and take the GGUF fields they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from macft.gguf.format import Field
from macft.gguf.vocabulary.fields import tokenizer_fields
from macft.gguf.vocabulary.files import read_vocabulary
from support.tiny_gguf import CONTROL, TEXT, TinyGguf, hf_weights, sentencepiece, write_gguf


def fields_of(folder: Path, *, template: str | None = None, rows: int = 0, **config: Any) -> dict[str, Field]:
    vocabulary = read_vocabulary(folder, config)
    return tokenizer_fields(vocabulary, config, template=template, vocab_rows=rows or len(vocabulary.tokens.texts))


def vocabulary_size(folder: Path) -> int:
    return len(read_vocabulary(folder, {}).tokens.texts)


def plain(fields: dict[str, Field]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}


def written(path: Path, fields: dict[str, Field]) -> Path:
    """The smallest llama with these fields; nobody reads its numbers here."""
    content = {name: value for name, value in plain(fields).items() if name != "tokenizer.ggml.eos_token_ids"}
    model = TinyGguf(
        layers=1, hidden=32, ffn=32, heads=2, kv_heads=1, head_dim=16, tied=True,
        tokens=tuple(content["tokenizer.ggml.tokens"]), types=tuple(content["tokenizer.ggml.token_type"]),
        scores=tuple(content.get("tokenizer.ggml.scores", ())), merges=tuple(content.get("tokenizer.ggml.merges", ())),
        fields={"tokenizer.chat_template": None, **content},
    )  # fmt: skip
    return write_gguf(path, model, hf_weights(model))


def write_byte_level(
    folder: Path, steps: list[Any], whole_words: bool, *, as_strings: bool = False, text: str = TEXT
) -> Tokenizer:
    """A tokenizer whose merges cross the borders of words, so that another cut gives other ids."""
    core = Tokenizer(models.BPE(ignore_merges=whole_words))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False, max_token_length=6)
    core.train_from_iterator([text] * 4 + text.split("\n") * 2, trainer)
    cuts = [
        pre_tokenizers.ByteLevel(add_prefix_space=False) if step == "gpt2"
        else pre_tokenizers.Split(Regex(step), "isolated") if isinstance(step, str) else step
        for step in steps
    ]  # fmt: skip
    if "gpt2" not in steps:
        cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    core.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROL])
    content = json.loads(core.to_str())
    if as_strings:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return core


def write_byte_fallback(folder: Path, *, prefix: Any) -> Tokenizer:
    """tokenizer.json alone, as transformers makes it of a SentencePiece model: merges in place of scores."""
    model = sentencepiece(TinyGguf())
    vocab = {text: id_ for id_, text in enumerate(model.tokens)}
    pairs = []
    for id_ in sorted(range(len(vocab)), key=lambda i: -model.scores[i]):
        text = model.tokens[id_]
        if model.types[id_] == gguf.TokenType.NORMAL or set(text) == {"▁"}:
            pairs += [(text[:k], text[k:]) for k in range(1, len(text)) if text[:k] in vocab and text[k:] in vocab]
    core = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    if prefix == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>", *CONTROL)])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return core
