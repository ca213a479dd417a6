"""Write tiny llama models with random weights as .gguf files, and ask llama.cpp about them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType

from macft.verify import llama_cpp as runtime

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = (
    "Hello world, hello there! It's we'll I'VE don't 'S 'quoted'  12345 3.14159 1,000 ٣٤٥ Ⅷ ½\n"
    "def f(x):\n\treturn x + 1  # comment\r\n\r\n\n    indented   \t  end $x<=>y^~|z`w` _under_score\n"
    "你好，世界！今天天气很好。 日本語テキスト 한국어 Привет мир café naïve Ünï ẞ 🎉👩‍👩‍👧 🇨🇳"
    "\u3000wide\u00a0nbsp "
    "<|im_start|>user\nhi<|im_end|>\n  trailing   "
)


@dataclass(frozen=True)
class TinyGguf:
    """Numbers and switches of a tiny model; the defaults are a sound file."""

    layers: int = 2
    hidden: int = 64
    ffn: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    theta: float = 123456.0
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    kind: Kind = Kind.F32
    fields: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    extra: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    pre: str = "smollm"


def byte_level(model: TinyGguf) -> TinyGguf:
    """With a byte-level vocabulary whose merges cross the borders of words, so that cutting shows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False, max_token_length=6)
    trained.train_from_iterator([line for line in TEXT.split("\n")] * 2 + [TEXT] * 2, trainer)
    content = json.loads(trained.to_str())["model"]
    vocab = sorted(content["vocab"], key=content["vocab"].__getitem__)
    vocab.append("Ġcomment")  # longer than the trainer's tokens: no merge leads to it
    tokens = (*CONTROL, *vocab, "<user_defined>")
    types = [TokenType.CONTROL] * len(CONTROL) + [TokenType.NORMAL] * len(vocab) + [TokenType.USER_DEFINED]
    merges = tuple(" ".join(merge) for merge in content["merges"])
    return replace(model, tokens=tokens, types=tuple(map(int, types)), merges=merges)


def sentencepiece(model: TinyGguf) -> TinyGguf:
    """With a vocabulary as SentencePiece BPE has it: byte tokens, scores that fall in order of merging."""
    from tokenizers import Tokenizer, models, trainers

    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, max_token_length=8)
    known = TEXT.replace("한국어", "").replace("🇨🇳", "")  # what is left out falls back to bytes
    lines = [f"▁{line}".replace(" ", "▁") for line in known.split("\n")]  # no vocabulary joins lines
    trained.train_from_iterator(lines * 2, trainer)
    content = json.loads(trained.to_str())["model"]
    vocab = sorted(content["vocab"], key=content["vocab"].__getitem__)
    spaces = ["▁▁", "▁▁▁▁"]
    vocab = [token for token in vocab if token not in spaces]
    tokens = ["<unk>", "<s>", "</s>", *CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), "<user_defined>"]
    types = [TokenType.UNKNOWN] + [TokenType.CONTROL] * 5 + [TokenType.BYTE] * 256 + [TokenType.USER_DEFINED]
    scores = [0.0] * len(tokens)
    tokens += spaces + vocab
    types += [TokenType.USER_DEFINED] * len(spaces) + [TokenType.NORMAL] * len(vocab)
    scores += [-1000.0] * len(spaces) + [-float(rank) for rank in range(len(vocab))]
    return replace(model, tokens=tuple(tokens), types=tuple(map(int, types)), scores=tuple(scores))


def raw_bpe(model: TinyGguf) -> TinyGguf:
    """With a vocabulary as Gemma 4 has it: merges over characters, "▁" for a space, byte tokens for the rest."""
    from tokenizers import Tokenizer, models, trainers

    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, max_token_length=8)
    lines = [line.replace(" ", "▁") for line in TEXT.replace("한국어", "").split("\n")]
    trained.train_from_iterator([*lines * 2, "\n\n\n\n", "\n\n\n"], trainer)
    content = json.loads(trained.to_str())["model"]
    vocab = sorted(content["vocab"], key=content["vocab"].__getitem__)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ("<pad>", *CONTROL, *bytes_, *vocab, "<user_defined>")
    types = [3] * 4 + [6] * 256 + [1] * len(vocab) + [4]
    merges = tuple(" ".join(merge) for merge in content["merges"])
    fields = {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.pre": None, **model.fields}
    return replace(model, tokens=tokens, types=tuple(types), merges=merges, fields=fields)


def hf_weights(model: TinyGguf, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Random weights under the names, and in the row order, of the Hugging Face llama."""
    rng = np.random.default_rng(seed)
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (len(model.tokens), model.hidden)}
    for layer in range(model.layers):
        linears = {
            "self_attn.q_proj": (q, model.hidden),
            "self_attn.k_proj": (kv, model.hidden),
            "self_attn.v_proj": (kv, model.hidden),
            "self_attn.o_proj": (model.hidden, q),
            "mlp.gate_proj": (model.ffn, model.hidden),
            "mlp.up_proj": (model.ffn, model.hidden),
            "mlp.down_proj": (model.hidden, model.ffn),
        }
        for name, shape in linears.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if model.attention_bias if "attn" in name else model.mlp_bias:
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (model.hidden,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (model.hidden,)
    shapes["model.norm.weight"] = (model.hidden,)
    if not model.tied:
        shapes["lm_head.weight"] = (len(model.tokens), model.hidden)
    weights = {}
    for name, shape in shapes.items():
        centre = 1.0 if "norm" in name else 0.0
        weights[name] = (centre + 0.2 * rng.standard_normal(shape)).astype(np.float32)
    return weights


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def _gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[rest]}.{suffix}"
    return f"{_GGUF_NAMES[stem]}.{suffix}"


def write_gguf(path: Path, model: TinyGguf, weights: dict[str, np.ndarray[Any, Any]]) -> Path:
    """Write a .gguf file as llama.cpp's converter lays it out: q and k rows interleaved per head."""
    writer = gguf.GGUFWriter(path, "llama")
    fields: dict[str, Any] = {
        "llama.block_count": model.layers, "llama.context_length": 512,
        "llama.embedding_length": model.hidden, "llama.feed_forward_length": model.ffn,
        "llama.attention.head_count": model.heads,
        "llama.attention.head_count_kv": model.kv_heads, "llama.attention.key_length": model.head_dim,
        "llama.attention.value_length": model.head_dim, "llama.rope.dimension_count": model.head_dim,
        "llama.rope.freq_base": model.theta, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(model.tokens), "tokenizer.ggml.model": "llama" if model.scores else "gpt2",
        "tokenizer.ggml.tokens": list(model.tokens), "tokenizer.ggml.token_type": list(model.types),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }  # fmt: skip
    if model.scores:
        fields["tokenizer.ggml.scores"] = list(model.scores)
    else:
        fields |= {"tokenizer.ggml.pre": model.pre, "tokenizer.ggml.merges": list(model.merges)}
    fields |= model.fields
    architecture = fields.pop("general.architecture", None)
    if architecture:
        writer.kv_data[0]["general.architecture"].value = architecture
    for key, value in fields.items():
        if value is not None:
            _add_field(writer, key, value)
    named = {_gguf_name(name): (name, array) for name, array in weights.items()}
    for name, (hf_name, array) in named.items():
        if name in model.without:
            continue
        if ".q_proj." in hf_name or ".k_proj." in hf_name:
            heads = model.heads if ".q_proj." in hf_name else model.kv_heads
            array = array.reshape(heads, 2, model.head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
        kind = model.kind if array.ndim == 2 else Kind.F32
        _add_tensor(writer, name, array, kind)
    for name, array in model.extra.items():
        _add_tensor(writer, name, array, Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray[Any, Any], kind: Kind) -> None:
    packed = gguf.quantize(np.ascontiguousarray(array), kind)
    writer.add_tensor(name, packed, raw_dtype=kind)


class LlamaCpp:
    """A running llama.cpp; what the tests ask of it."""

    def __init__(self, server: runtime.LlamaCpp) -> None:
        self._server = server

    def post(self, route: str, content: dict[str, Any]) -> Any:
        return self._server.post(route, content)

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids, with special tokens in the text parsed."""
        return self._server.tokenize(text, add_special=add_special)

    def top_logprobs(self, tokens: list[int], count: int) -> dict[int, float]:
        """The `count` likeliest next tokens after `tokens`, with their log-probabilities."""
        ids, logps = self._server.next_logps(tokens, count)
        return dict(zip(ids.tolist(), logps.tolist(), strict=True))


@contextmanager
def llama_cpp(path: Path, *, loras: Sequence[Path] = (), context: int = 256) -> Iterator[LlamaCpp]:
    """llama.cpp with the model at `path`, on one thread."""
    with runtime.llama_cpp(path, loras=loras, context=context, threads=1) as server:
        yield LlamaCpp(server)


def write_spm_model(
    folder: Path, *, size: int = 480, own: tuple[str, ...] = ("<user_defined>",), settings: dict[str, Any] | None = None
) -> int:
    """A tokenizer.model trained by the SentencePiece library, with byte fallback; returns the vocabulary's size.

    `own` are user-defined pieces, `settings` go into tokenizer_config.json.
    """
    import io

    import sentencepiece

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in TEXT.split("\n") if line.strip()] * 4),
        model_writer=trained,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        character_coverage=0.99,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=CONTROL,
        user_defined_symbols=list(own),
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **(settings or {})}), encoding="utf-8")
    return int(sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue()).vocab_size())
