"""Measure what each quantization costs: file size, KL divergence and top-1 agreement with the f32 file, in llama.cpp.

SmolLM2-135M twice: as it is, 576 wide, which the blocks of 256 of most K-quants do not divide; and padded with zeros
to a width of 768 (12 heads, 4 key heads), which computes the same and takes every K-quant. Next-token distributions
over the whole vocabulary after prefixes of English, Chinese and code are compared. Prints a Markdown table.

    python benchmarks/quantization.py [--positions 64]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from macft.data.templates.chat_template import load_template
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.gguf.exporter.export import export_gguf
from macft.gguf.writing.quantize import QUANTS
from macft.models.locate import resolve_model
from macft.verify.llama_cpp import LlamaCpp, llama_cpp
from macft.weights.folder import ModelFolder
from macft.weights.source import open_model
from macft.weights.tensors.lazy import from_array
from macft.weights.writer import write_model

HEAD, WIDTH, KEY_WIDTH = 64, 768, 256
TEXT = (
    "The moon is the only natural satellite of the Earth. It orbits at an average distance of 384,400 kilometres, "
    "about thirty times the diameter of the planet, and always shows the same face. Its gravity causes the tides.\n"
    "北京是中华人民共和国的首都，也是全国的政治、文化中心。这座城市有三千多年的历史。\n"
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n"
)


def padded(array: np.ndarray, *shape: int) -> np.ndarray:
    """The array in the corner of zeros."""
    return np.pad(array, [(0, new - old) for new, old in zip(shape, array.shape, strict=True)])


def widen(source: Path, destination: Path) -> None:
    """SmolLM2-135M with zeros around its numbers: the same logits from matrices of 768 columns."""
    model = open_model(source)
    old = model.config["hidden_size"]
    share = old / WIDTH  # RMSNorm divides by the root of the mean square, which the zeros make smaller
    shapes: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
        "embed_tokens": lambda s: (s[0], WIDTH),
        "norm": lambda _: (WIDTH,),
        "q_proj": lambda _: (WIDTH, WIDTH),
        "k_proj": lambda _: (KEY_WIDTH, WIDTH),
        "v_proj": lambda _: (KEY_WIDTH, WIDTH),
        "o_proj": lambda _: (WIDTH, WIDTH),
        "gate_proj": lambda s: (s[0], WIDTH),
        "up_proj": lambda s: (s[0], WIDTH),
        "down_proj": lambda s: (WIDTH, s[1]),
    }
    tensors = []
    for tensor in model.tensors:
        kind = next(kind for kind in shapes if kind in tensor.name)
        array = tensor.read().astype(np.float32)
        scale = np.float32(np.sqrt(share)) if kind == "norm" else np.float32(1)
        tensors.append(from_array(tensor.name, padded(array * scale, *shapes[kind](array.shape))))
    sizes = {"hidden_size": WIDTH, "num_attention_heads": WIDTH // HEAD, "num_key_value_heads": KEY_WIDTH // HEAD}
    own = {**sizes, "head_dim": HEAD, "rms_norm_eps": model.config["rms_norm_eps"] * share}
    write_model(destination, {**model.config, **own}, tensors, source_folder=source, layout="hf")


def distributions(path: Path, tokens: list[int], places: list[int], count: int) -> np.ndarray:
    """float64 [places, V]: log-probabilities of the next token after each prefix."""
    found = np.empty((len(places), count))
    with llama_cpp(path) as server:
        for row, place in enumerate(places):
            found[row] = _normalized(server, tokens[:place], count)
    return found


def _normalized(server: LlamaCpp, tokens: list[int], count: int) -> np.ndarray:
    ids, logps = server.next_logps(tokens, count)
    row = np.full(count, -np.inf)
    row[ids] = np.maximum(logps, -110.0)
    row -= row.max()
    return row - np.log(np.exp(row).sum())


def measure(name: str, folder: Path, work: Path, positions: int) -> list[dict[str, Any]]:
    """A row for every quantization of one model."""
    outputs = {quant: work / f"{name}-{quant}.gguf" for quant in QUANTS}
    report = export_gguf(
        ModelFolder(name, folder),
        [],
        outputs,
        template=load_template(folder, load_tokenizer(folder).special_map).source,
    )
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.encode(TEXT).ids
    places = sorted({int(place) for place in np.linspace(4, len(tokens), positions)})
    exact = distributions(outputs["f32"], tokens, places, tokenizer.vocab_size)
    rows = []
    for written in report.files:
        found = distributions(written.path, tokens, places, tokenizer.vocab_size)
        divergence = (np.exp(exact) * (exact - found)).sum(axis=1)
        rows.append(
            {
                "model": name,
                "quant": written.quant,
                "megabytes": written.nbytes / 1e6,
                "kinds": written.kinds,
                "kl": float(divergence.mean()),
                "worst": float(divergence.max()),
                "top1": float((exact.argmax(axis=1) == found.argmax(axis=1)).mean()),
            }
        )
        row = rows[-1]
        kinds = ", ".join(f"{count} {kind}" for kind, count in written.kinds.items() if kind != "F32")
        print(
            f"| {name} | {row['quant']} | {row['megabytes']:.1f} | {row['kl']:.5f} | {row['worst']:.4f} "
            f"| {row['top1']:.1%} | {kinds} |",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--json", type=Path, help="Also write the rows here.")
    arguments = parser.parse_args()
    narrow = resolve_model("smollm2-135m").path
    print("| model | quant | MB | KL (nats) | worst KL | top-1 | tensors |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="macft-quantization-") as folder:
        widen(narrow, Path(folder) / "wide")
        rows = measure("SmolLM2-135M", narrow, Path(folder), arguments.positions)
        rows += measure("SmolLM2-135M, 768 wide", Path(folder) / "wide", Path(folder), arguments.positions)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
