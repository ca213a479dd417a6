"""Measure time and memory of LoRA SFT steps on SmolLM2-135M: macft on both engines, mlx-lm and TRL, side by side.

Every contender trains in a process of its own on the same rows, rank 8 on all linear layers, the same
batch size, float32. The first two steps are warm-up. Prints a Markdown table.

    python benchmarks/train_step.py [--steps 8] [--batch-size 4] [CONTENDER ...]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2
RANK, ALPHA, LR = 8, 16, 1e-4


def rows(count: int) -> tuple[Path, list]:
    """The model's folder, and tokenized rows of the quickstart data."""
    from macft.data.cache.cache import tokenized
    from macft.data.formats.dataset import Request
    from macft.data.kinds import SFT
    from macft.data.sources.resolve import resolve_sources
    from macft.data.templates.chat_template import load_template
    from macft.data.tokenization.encoding import Encoding
    from macft.data.tokenization.tokenizer import load_tokenizer
    from macft.models.locate import resolve_model

    folder = resolve_model("smollm2-135m").path
    tokenizer = load_tokenizer(folder)
    encoding = Encoding(tokenizer, load_template(folder, tokenizer.special_map), cutoff_len=256)
    request = Request(SFT, resolve_sources(str(ROOT / "data" / "quickstart.jsonl"), "data"))
    examples, _ = SFT.take(tokenized(request, encoding)[0], encoding)
    return folder, (list(examples) * 9)[:count]


def run_macft(engine: str, steps: int, batch_size: int) -> tuple[float, int]:
    """(seconds of the timed steps, tokens in them)."""
    from macft.backends import load_model
    from macft.backends.base import LoraSpec, ModelSpec, OptimizerSpec
    from macft.data.batches import collate
    from macft.objectives.losses import Sft
    from macft.process_group import ONE_PROCESS

    folder, examples = rows(steps * batch_size)
    spec = ModelSpec(folder=folder, lora=LoraSpec(RANK, ALPHA), precision="float32")
    model = load_model(engine, spec, OptimizerSpec(), ONE_PROCESS)
    start = tokens = 0
    for step in range(steps):
        if step == WARM_UP:
            start, tokens = time.perf_counter(), 0
        batch = collate(examples[step * batch_size : (step + 1) * batch_size])
        model.train_step(Sft(), [batch], weight=Sft().weight(batch), lr=LR, step=step)
        tokens += int(batch.lengths.sum())
    return time.perf_counter() - start, tokens


def run_mlx_lm(steps: int, batch_size: int) -> tuple[float, int]:
    """mlx-lm's own trainer on the same rows, prompts masked, behind the same BLAS."""
    import macft.backends.mlx  # noqa: F401  # OpenBLAS: without it mlx-lm is a hundred times slower here

    # isort: split
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    from macft.weights.model_config import normalize_config, read_config

    folder, examples = rows(steps * batch_size)
    model, _ = load_model(folder, model_config=normalize_config(read_config(folder)))
    model.set_dtype(__import__("mlx.core").core.float32)
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0})
    # (tokens, where the answer begins), as its chat data sets hand out
    data = [(example.tokens.tolist(), int(example.loss_mask.argmax())) for example in examples]
    marks: list[tuple[float, int]] = []

    class Note(TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            marks.append((time.perf_counter(), int(info["trained_tokens"])))

    arguments = TrainingArgs(
        batch_size=batch_size, iters=steps, steps_per_report=1, val_batches=1, steps_per_eval=10**9,
        steps_per_save=10**9, max_seq_length=256, adapter_file="/dev/null",
    )  # fmt: skip
    train(model, optim.AdamW(LR), data, data[:batch_size], args=arguments, training_callback=Note())
    mean = sum(len(tokens) for tokens, _ in data) / len(data)
    return marks[-1][0] - marks[WARM_UP - 1][0], round(mean * batch_size * (steps - WARM_UP))


def run_trl(steps: int, batch_size: int) -> tuple[float, int]:
    """TRL's SFTTrainer with PEFT on the same tokens, prompts masked."""
    import tempfile

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    folder, examples = rows(steps * batch_size)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = Dataset.from_list(
        [{"input_ids": e.tokens.tolist(), "completion_mask": e.loss_mask.astype(int).tolist()} for e in examples]
    )
    marks: list[float] = []

    class Note(TrainerCallback):
        def on_step_end(self, *_arguments, **_more) -> None:
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output, per_device_train_batch_size=batch_size, max_steps=steps, learning_rate=LR,
            logging_steps=10**6, save_strategy="no", report_to="none", bf16=False, use_cpu=True, max_length=256,
            gradient_checkpointing=False, completion_only_loss=True,
        )  # fmt: skip
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        SFTTrainer(
            model, args=config, train_dataset=data, peft_config=lora, processing_class=tokenizer, callbacks=[Note()]
        ).train()
    mean = sum(len(e.tokens) for e in examples) / len(examples)
    return marks[-1] - marks[WARM_UP - 1], round(mean * batch_size * (steps - WARM_UP))


CONTENDERS = {
    "macft mlx": lambda steps, size: run_macft("mlx", steps, size),
    "macft torch": lambda steps, size: run_macft("torch", steps, size),
    "mlx-lm": run_mlx_lm,
    "TRL": run_trl,
}


def main() -> None:
    """Run the contenders one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contenders", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        seconds, tokens = CONTENDERS[options.contenders[0]](options.steps, options.batch_size)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(json.dumps({"seconds": seconds / (options.steps - WARM_UP), "rate": tokens / seconds, "peak": peak}))
        return
    print("| trainer | s / step | tokens / s | peak memory |\n| --- | --- | --- | --- |")
    for name in options.contenders:
        command = [sys.executable, __file__, name, "--child", "--steps", str(options.steps)]
        done = subprocess.run(
            [*command, "--batch-size", str(options.batch_size)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"| {name} | failed: {(done.stderr.strip().splitlines() or ['?'])[-1]} | | |", flush=True)
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"| {name} | {found['seconds']:.2f} | {found['rate']:.0f} | {found['peak'] / 1e9:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()
