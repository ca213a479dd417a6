"""Measure time and memory of tokenizing chat rows with their loss masks: macft and TRL, side by side.

Both read the same generated JSONL file of short conversations and end with token ids and masks of the answers
that can be trained on, in a file on disk (TRL: the Arrow cache of `datasets`), with one chat template and one
tokenizer, each contender in a process of its own. Of TRL its SFTTrainer's preparation of the data set is timed,
reading included, the model's loading left out. Prints a Markdown table.

    python benchmarks/tokenize_chats.py [--rows 50000] [--cores 2] [--model smollm2-135m] [CONTENDER ...]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

CUTOFF = 1024
# TRL finds the answers by these tags, which change no text
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>\\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_TEXT = (
    "the quick brown fox jumps over lazy dog please explain how this works and write code for sorting a list of "
    "numbers in python answer my question about history science mathematics music with an example that is short"
)
WORDS = _TEXT.split()


def write_rows(path: Path, rows: int) -> None:
    """Conversations of one or two turns."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            messages = []
            for _ in range(int(rng.integers(1, 3))):
                for role, longest in (("user", 30), ("assistant", 60)):
                    text = " ".join(rng.choice(WORDS, int(rng.integers(5, longest))))
                    messages.append({"role": role, "content": text.capitalize() + "."})
            file.write(json.dumps({"messages": messages}) + "\n")


def run_macft(rows: Path, template: Path, model: Path, cores: int) -> tuple[int, int]:
    """Tokenizes, or finds what an earlier process has left."""
    from macft.data.cache.cache import tokenized
    from macft.data.formats.dataset import Request
    from macft.data.kinds import SFT
    from macft.data.sources.resolve import resolve_sources
    from macft.data.templates.chat_template import load_template
    from macft.data.tokenization.encoding import Encoding
    from macft.data.tokenization.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    encoding = Encoding(tokenizer, load_template(model, tokenizer.special_map, str(template)), CUTOFF)
    table, _ = tokenized(Request(SFT, resolve_sources(str(rows), ".")), encoding, workers=cores)
    return len(table.tokens), int(table.columns["trained"].sum())


def run_trl(rows: Path, template: Path, model: Path, cores: int) -> tuple[int, int]:
    """SFTTrainer's own preparation, on a model too small to matter."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    tiny = LlamaForCausalLM(config)
    start, busy = time.perf_counter(), cpu_seconds()
    data = load_dataset("json", data_files=str(rows), split="train")
    arguments = SFTConfig(
        output_dir=str(rows.parent / "trl"),
        max_length=CUTOFF,
        assistant_only_loss=True,
        dataset_num_proc=cores if cores > 1 else None,
        report_to="none",
        use_cpu=True,
    )
    trainer = SFTTrainer(tiny, args=arguments, train_dataset=data, processing_class=tokenizer)
    _seconds.append(time.perf_counter() - start)
    _cpu.append(cpu_seconds() - busy)
    prepared = trainer.train_dataset
    tokens = sum(map(len, prepared["input_ids"]))
    return tokens, sum(sum(label >= 0 for label in row) for row in prepared["labels"])


# what a contender times itself
_seconds: list[float] = []
_cpu: list[float] = []


def cpu_seconds() -> float:
    """What this process and its children, those that have ended, have computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


Contender = Callable[[Path, Path, Path, int], tuple[int, int]]
# name: (function, whether on all cores)
CONTENDERS: dict[str, tuple[Contender, bool]] = {
    "macft": (run_macft, True),
    "macft-again": (run_macft, True),
    "trl": (run_trl, True),
    "trl-one-process": (run_trl, False),
}


def run_alone(name: str, folder: Path, model: Path, cores: int) -> None:
    """One contender in this process; prints its figures as JSON."""
    run, on_all_cores = CONTENDERS[name]
    start = time.perf_counter()
    tokens, trained = run(folder / "rows.jsonl", folder / "chat.jinja", model, cores if on_all_cores else 1)
    seconds = _seconds[0] if _seconds else time.perf_counter() - start
    cpu = _cpu[0] if _cpu else cpu_seconds()
    unit = 1 if sys.platform == "darwin" else 1024
    own, child = (resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    figures = {"seconds": seconds, "cpu": cpu, "own": own, "child": child, "tokens": tokens, "trained": trained}
    print(json.dumps(figures))


def measure(name: str, folder: Path, model: Path, cores: int) -> dict[str, float]:
    """The figures of one contender in a process of its own."""
    caches = {"HF_DATASETS_CACHE": str(folder / name), "MACFT_CACHE": str(folder / "macft"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--alone", name, "--folder", folder, "--model", model, "--cores", str(cores)]
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Parse the command line, run the contenders, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("contenders", nargs="*", metavar="CONTENDER", help=f"some of {', '.join(CONTENDERS)}")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        run_alone(given.alone, given.folder, Path(given.model), given.cores)
        return
    from macft.models.locate import resolve_model

    model = resolve_model(given.model).path
    with tempfile.TemporaryDirectory(prefix="macft-benchmark-") as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", given.rows)
        (folder / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
        print(f"{given.rows} rows, {given.cores} cores\n")
        print("| | seconds | rows/s | CPU seconds | peak memory, main process | largest child | tokens | trained |")
        print("|---|---|---|---|---|---|---|---|")
        for contender in given.contenders or CONTENDERS:
            found = measure(contender, folder, model, given.cores)
            print(
                f"| {contender} | {found['seconds']:.1f} | {given.rows / found['seconds']:.0f} | {found['cpu']:.1f} "
                f"| {found['own'] / 1e6:.0f} MB | {found['child'] / 1e6:.0f} MB "
                f"| {found['tokens']:.0f} | {found['trained']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
