"""Measure time and memory of merging a LoRA adapter into a 1 GB model: macft and PEFT, side by side.

Both write the same random llama-shaped bfloat16 model, rank 16 on all linear layers, each in a process of its
own with the files in the page cache. macft flushes to disk and writes checksums, PEFT does neither; so the
time until the data is on the disk (a sync after the process) is given as well. Prints a Markdown table.

    python benchmarks/merge.py [--layers 8] [--repeat 3] [CONTENDER ...]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from macft.weights.adapters.peft import AdapterConfig, write_adapter
from macft.weights.tensors.lazy import LazyTensor
from macft.weights.writer import write_model

HIDDEN, FFN, VOCABULARY, RANK = 2048, 8192, 32000, 16
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def make_model(folder: Path, layers: int) -> None:
    """A random model in bfloat16, with a head of its own."""
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    for index in range(layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in LINEARS.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{index}.{norm}"] = (HIDDEN,)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)

    def read(shape: tuple[int, ...], seed: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32).astype(bfloat16)

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
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    write_model(folder, config, tensors, source_folder=folder, layout="hf")


def make_adapter(folder: Path, layers: int) -> None:
    """A random adapter on every linear layer of the blocks."""
    rng = np.random.default_rng(1)
    state = {}
    for index in range(layers):
        for name, (rows, columns) in LINEARS.items():
            module = f"base_model.model.model.layers.{index}.{name}"
            state[f"{module}.lora_A.weight"] = rng.normal(0, 0.02, (RANK, columns)).astype(np.float32)
            state[f"{module}.lora_B.weight"] = rng.normal(0, 0.02, (rows, RANK)).astype(np.float32)
    folder.mkdir()
    targets = tuple(name.rpartition(".")[2] for name in LINEARS)
    write_adapter(folder, AdapterConfig("random", RANK, 2.0 * RANK, 0.0, targets), state, base_hash="")


def make_files(model: Path, adapter: Path, layers: int) -> None:
    """The base and the adapter."""
    make_model(model, layers)
    make_adapter(adapter, layers)


def run_macft(model: Path, adapter: Path, destination: Path) -> None:
    """`macft export merged` without the command line."""
    from macft.conversion.merged import export_merged
    from macft.models.locate import resolve_model
    from macft.weights.adapters.peft import read_adapter

    export_merged(resolve_model(str(model)), [read_adapter(adapter)], destination)


def run_peft(model: Path, adapter: Path, destination: Path) -> None:
    """PEFT's documented way."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(destination)


def run_copy(model: Path, _adapter: Path, destination: Path) -> None:
    """The floor: the same bytes copied by the kernel, and flushed."""
    shutil.copytree(model, destination)
    with (destination / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())


CONTENDERS = {"macft": run_macft, "peft": run_peft, "copy": run_copy}


def measure(name: str, model: Path, adapter: Path, destination: Path) -> dict[str, float]:
    """Seconds and peak memory of one run in a process of its own, and seconds until the disk has it all."""
    os.sync()
    command = [sys.executable, __file__, name, "--run", str(model), str(adapter), str(destination)]
    start = time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    os.sync()
    found["on_disk"] = time.perf_counter() - start
    shutil.rmtree(destination)
    return found


def run_one(name: str, model: Path, adapter: Path, destination: Path) -> None:
    """One run; prints its figures as JSON."""
    start = time.perf_counter()
    CONTENDERS[name](model, adapter, destination)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak * scale / 1e6}))


def main() -> None:
    """Run each contender `--repeat` times in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contenders", nargs="*", default=[])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--run", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.contenders or list(CONTENDERS)
    if options.run:
        run_one(names[0], *options.run)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model, adapter = Path(scratch) / "model", Path(scratch) / "adapter"
        # in a child, for Linux counts a parent's peak as its children's
        child = multiprocessing.get_context("spawn").Process(target=make_files, args=(model, adapter, options.layers))
        child.start()
        child.join()
        size = (model / "model.safetensors").stat().st_size
        print(f"{size / 1e9:.2f} GB of bfloat16, {os.cpu_count()} cores, median of {options.repeat}\n")
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(options.repeat):
            for name in names:
                rows[name].append(measure(name, model, adapter, Path(scratch) / "merged"))
    print("| | seconds | with start and sync | peak memory, MB |\n|---|---|---|---|")
    for name, found in rows.items():
        seconds, on_disk, peak = (
            statistics.median(row[key] for row in found) for key in ("seconds", "on_disk", "peak")
        )
        print(f"| {name} | {seconds:.2f} | {on_disk:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
