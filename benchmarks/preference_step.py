"""Measure time and memory of LoRA DPO steps on SmolLM2-135M: macft on both engines, TRL and mlx-lm-lora, side by side.

Every contender trains in a process of its own on the same pairs in the same order, rank 8 on all linear
layers, the same batch size, rows of at most 512 tokens, float32. The first two steps are warm-up. The
reference of the pairs of the timed steps is part of the time. Prints a Markdown table.

    python benchmarks/preference_step.py [--steps 8] [--batch-size 2] [--pairs FILE] [CONTENDER ...]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2
RANK, ALPHA, LR, BETA = 8, 16, 1e-5, 0.1
CUTOFF = 512


@dataclass(frozen=True)
class Job:
    """What every contender is given: the model's folder, and tokenized pairs for every step."""

    folder: Path
    pairs: list
    steps: int
    batch_size: int

    @property
    def timed(self) -> list:
        """The pairs of the steps after the warm-up."""
        return self.pairs[WARM_UP * self.batch_size :]


@dataclass(frozen=True)
class Result:
    """Seconds of the timed steps with their reference, and trainable parameters."""

    seconds: float
    parameters: int


def read_job(path: Path, steps: int, batch_size: int) -> Job:
    """The first pairs of a file, from its start again when they do not suffice."""
    from macft.data.cache.cache import tokenized
    from macft.data.formats.dataset import Request
    from macft.data.kinds import DPO
    from macft.data.sources.resolve import resolve_sources
    from macft.data.templates.chat_template import load_template
    from macft.data.tokenization.encoding import Encoding
    from macft.data.tokenization.tokenizer import load_tokenizer
    from macft.models.locate import resolve_model

    folder = resolve_model("smollm2-135m").path
    tokenizer = load_tokenizer(folder)
    encoding = Encoding(tokenizer, load_template(folder, tokenizer.special_map), CUTOFF)
    count = steps * batch_size
    request = Request(DPO, resolve_sources(str(path), "data"), count)
    pairs, _ = DPO.take(tokenized(request, encoding)[0], encoding)
    return Job(folder, [pairs[i % len(pairs)] for i in range(count)], steps, batch_size)


def run_macft(job: Job, engine: str) -> Result:
    """Reference of the timed pairs first, as the trainer computes it, then the steps."""
    from macft.backends import load_model
    from macft.backends.base import LoraSpec, ModelSpec, OptimizerSpec
    from macft.data.batches import collate
    from macft.objectives.preference import Preference
    from macft.process_group import ONE_PROCESS

    spec = ModelSpec(folder=job.folder, lora=LoraSpec(RANK, ALPHA), precision="float32")
    model = load_model(engine, spec, OptimizerSpec(), ONE_PROCESS)
    objective = Preference(beta=BETA)
    size = job.batch_size

    def train(pairs: Sequence, first: int) -> None:
        for i in range(0, len(pairs), size):
            batch = collate(pairs[i : i + size])
            model.train_step(objective, [batch], weight=objective.weight(batch), lr=LR, step=first + i // size)

    train(with_reference(model, job.pairs[: WARM_UP * size], size), 0)
    start = time.perf_counter()
    train(with_reference(model, job.timed, size), WARM_UP)
    return Result(time.perf_counter() - start, model.info.trainable_parameters)


def with_reference(model, pairs: Sequence, batch_size: int) -> list:
    """The pairs with what the policy says of them now."""
    from macft.data.batches import in_order
    from macft.data.tokenization.table import Reference
    from macft.objectives.preference import answer_positions, reference_columns

    filled = list(pairs)
    for indices, batch in in_order(pairs, batch_size):
        logps = model.logps(batch, answer_positions(batch, with_prompt=False))
        columns = zip(*reference_columns(logps, batch, None), strict=True)
        for index, values in zip(indices, columns, strict=True):
            filled[index] = replace(pairs[index], reference=Reference(*map(float, values)))
    return filled


def run_trl(job: Job, *, precompute: bool = False, checkpointing: bool = True) -> Result:
    """TRL's DPOTrainer with PEFT on the same tokens.

    Its reference is the model without the adapter, in every step or (`precompute`) in one pass before them.
    """
    import tempfile

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    marks: list[float] = []
    reference: list[float] = []

    class Note(TrainerCallback):
        def on_step_end(self, *_arguments, **_more) -> None:
            marks.append(time.perf_counter())

    class Tokenized(DPOTrainer):
        """Takes rows that are tokenized already, and notes how long the reference pass took."""

        def _prepare_dataset(self, dataset, *_arguments):
            return dataset

        def _precompute_ref_logps(self, *arguments):
            start = time.perf_counter()
            done = super()._precompute_ref_logps(*arguments)
            reference.append(time.perf_counter() - start)
            return done

    rows = [
        {
            "prompt_ids": pair.chosen.tokens[: pair.prompt_length].tolist(),
            "chosen_ids": pair.chosen.tokens[pair.prompt_length :].tolist(),
            "rejected_ids": pair.rejected.tokens[pair.prompt_length :].tolist(),
        }
        for pair in job.pairs
    ]
    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output, per_device_train_batch_size=job.batch_size, max_steps=job.steps, learning_rate=LR,
            logging_steps=10**6, save_strategy="no", report_to="none", bf16=False, use_cpu=True, max_length=CUTOFF,
            train_sampling_strategy="sequential", beta=BETA, gradient_checkpointing=checkpointing,
            precompute_ref_log_probs=precompute,
        )  # fmt: skip
        trainer = Tokenized(
            AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast.from_pretrained(job.folder),
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Note()],
        )
        trainer.train()
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    share = len(job.timed) / len(job.pairs)
    return Result(marks[-1] - marks[WARM_UP - 1] + share * sum(reference), parameters)


def run_mlx_lm_lora(job: Job) -> Result:
    """mlx-lm-lora's own trainer on the same rows, its second model for reference, behind the same BLAS."""
    import tempfile

    from macft.backends.mlx.blas import preload

    # OpenBLAS, before anything imports MLX: without it MLX is a hundred times slower on Linux.
    preload()
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model
    from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, train_dpo

    from macft.weights.model_config import normalize_config, read_config

    if not mx.metal.is_available():
        # Its trainer asks for a limit that only Metal has.
        mx.device_info = lambda: {"max_recommended_working_set_size": 0}
        mx.set_wired_limit = lambda _limit: 0

    def load():
        model, _ = load_model(job.folder, model_config=normalize_config(read_config(job.folder)))
        model.set_dtype(mx.float32)
        model.freeze()
        return model

    model = load()
    linear_to_lora_layers(model, -1, {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0})
    marks: list[float] = []

    class Note(TrainingCallback):
        def on_train_loss_report(self, _info: dict) -> None:
            marks.append(time.perf_counter())

    class Window:
        """The pairs of the step at hand: its sampler draws batches at random from a whole data set."""

        def __len__(self) -> int:
            return job.batch_size

        def __getitem__(self, index: int) -> dict:
            pair = job.pairs[len(marks) * job.batch_size + index]
            return {
                "chosen": pair.chosen.tokens.tolist(),
                "rejected": pair.rejected.tokens.tolist(),
                "chosen_prompt_length": pair.prompt_length,
                "rejected_prompt_length": pair.prompt_length,
            }

    with tempfile.TemporaryDirectory() as output:
        arguments = DPOTrainingArgs(
            batch_size=job.batch_size, iters=job.steps, steps_per_report=1, steps_per_save=10**9, beta=BETA,
            max_seq_length=CUTOFF, adapter_file=str(Path(output) / "adapters.safetensors"),
        )  # fmt: skip
        train_dpo(model, load(), optim.AdamW(LR), Window(), args=arguments, training_callback=Note())
    parameters = sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
    return Result(marks[-1] - marks[WARM_UP - 1], parameters)


CONTENDERS = {
    "macft mlx": lambda job: run_macft(job, "mlx"),
    "macft torch": lambda job: run_macft(job, "torch"),
    "TRL": run_trl,
    "TRL, reference first": lambda job: run_trl(job, precompute=True),
    "TRL, no checkpointing": lambda job: run_trl(job, checkpointing=False),
    "mlx-lm-lora": run_mlx_lm_lora,
}


def run_child(name: str, path: Path, steps: int, batch_size: int) -> None:
    """Run one contender and print what was found as one line of JSON."""
    job = read_job(path, steps, batch_size)
    result = CONTENDERS[name](job)
    timed = steps - WARM_UP
    tokens = sum(len(row.tokens) for pair in job.timed for row in (pair.chosen, pair.rejected))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {
        "seconds": result.seconds / timed,
        "rate": tokens / result.seconds,
        "peak": peak,
        "parameters": result.parameters,
    }
    print(json.dumps(found))


def main() -> None:
    """Run the contenders one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contenders", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--pairs", type=Path, default=ROOT / "data" / "quickstart_pairs.jsonl")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= WARM_UP:
        parser.error(f"--steps: {options.steps}, expected more than the {WARM_UP} of the warm-up")
    if unknown := [name for name in options.contenders if name not in CONTENDERS]:
        parser.error(f"no contender {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
    if options.child:
        run_child(options.contenders[0], options.pairs, options.steps, options.batch_size)
        return
    print("| trainer | s / step | tokens / s | peak memory | parameters trained |\n| --- | --- | --- | --- | --- |")
    for name in options.contenders:
        command = [sys.executable, __file__, name, "--child", "--steps", str(options.steps)]
        command += ["--batch-size", str(options.batch_size), "--pairs", str(options.pairs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"| {name} | failed: {(done.stderr.strip().splitlines() or ['?'])[-1]} | | | |", flush=True)
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        numbers = [f"{found['seconds']:.2f}", f"{found['rate']:.0f}", f"{found['peak'] / 1e9:.2f} GB"]
        print(f"| {name} | {' | '.join(numbers)} | {found['parameters']:,} |", flush=True)


if __name__ == "__main__":
    main()
