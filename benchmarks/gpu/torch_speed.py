"""Measure steps of the PyTorch engine on CUDA: tokens per second, memory, kernels."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from benchmarks.gpu.models import (
    HALF_BILLION,
    flops_per_token,
    packed_rows,
    parameters,
    tokens_of_a_pass,
    whole_rows,
)
from benchmarks.gpu.table import Row, SkipCheck, measured, outcome, skipped
from benchmarks.gpu.torch_common import (
    FOLDER,
    GB,
    SHAPES,
    fitting,
    folder_of,
    load,
    matmul_rate,
    native,
    sixteen,
    steps,
    timed,
    torch_or_skip,
)


def kernels(run) -> dict[str, float]:
    """Names of the CUDA kernels of `run`, with their milliseconds."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / 1e3 for event in found.key_averages()}


def attention() -> Iterator[Row]:
    """Which attention kernels plain, packed and shared rows take, and what packing costs."""
    torch = torch_or_skip()
    from dataclasses import replace

    from support.tiny_models import random_pairs

    from macft.data.batches import collate
    from macft.data.tokenization.table import Reference
    from macft.objectives.losses import Sft
    from macft.objectives.preference import Preference

    pairs = [replace(p, reference=Reference(0, 0, 0)) for p in random_pairs(2, prompt=(300, 300), answer=(100, 200))]
    cases = {
        "plain": (whole_rows(4, 512), Sft()),
        "packed": (packed_rows(2, 8, 256), Sft()),
        "shared prompts": (collate(pairs), Preference()),
    }
    model = load(folder_of("0.5B"), packing=True, max_length=2048)
    for name, (batch, objective) in cases.items():
        steps(model, objective, [batch])
        names = kernels(lambda b=batch, o=objective: steps(model, o, [b]))
        used = sorted(
            {word for word in ("flash", "cudnn", "fmha", "softmax_warp") for key in names if word in key.lower()}
        )
        yield outcome(
            f"{native()}, attention kernels, {name}",
            "no softmax of whole score matrices",
            ", ".join(used) or "none found",
            "softmax_warp" not in used,
        )
    for rows, parts, length in ((4, 10, 204), (1, 10, 819)):
        batch, found = packed_rows(rows, parts, length), []
        for uses_varlen in (model._split.uses_varlen, False):
            model._split.uses_varlen, before = uses_varlen, model._split.uses_varlen
            torch.cuda.reset_peak_memory_stats()
            rate = batch.tokens.size / timed(model, batch)
            found.append(f"{rate:,.0f} tokens/s, {torch.cuda.max_memory_allocated() / GB:.1f} GB")
            model._split.uses_varlen = before
        yield measured(
            f"{native()}, 0.5B, {rows} packed rows of {parts} x {length}, by kernel and masked", "", "; ".join(found)
        )


def shapes() -> Iterator[Row]:
    """Steps of shapes not seen before beside the same shapes again, without and with cuDNN's attention."""
    torch = torch_or_skip()
    from macft.objectives.losses import Sft

    rng = np.random.default_rng(0)
    drawn = [(int(rng.integers(1, 9)), int(rng.integers(32, 700))) for _ in range(40)]
    batches = [whole_rows(*shape) for shape in drawn]
    for uses_cudnn in (False, True):
        model = load(folder_of("0.5B"), max_length=1024)
        torch.backends.cuda.enable_cudnn_sdp(uses_cudnn)
        steps(model, Sft(), batches[:2])
        seconds = []
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            steps(model, Sft(), batches)
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / len(batches))
        reserved = torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated()
        large = whole_rows(8, 1024)
        found = (
            f"{seconds[0] * 1e3:.0f} and {seconds[1] * 1e3:.0f} ms a step, reserved {reserved:.2f} x, "
            f"8 x 1024 {8192 / timed(model, large):,.0f} tokens/s"
        )
        check = f"{native()}, 0.5B, 40 shapes for the first time and again"
        if uses_cudnn:
            yield measured(f"{check}, with cuDNN's attention", "", found)
        else:
            passes = seconds[0] < 1.3 * seconds[1] and reserved < 1.3
            yield outcome(check, "first below 1.3 x again, reserved below 1.3 x allocated", found, passes)
    torch.backends.cuda.enable_cudnn_sdp(False)


def memory() -> Iterator[Row]:
    """The peak of a step beside the plan's estimate; the default batch on a card with 12 GB free."""
    torch = torch_or_skip()
    from macft.errors import ModelError

    for name, rows, length in (("0.5B", 8, 1024), ("3B", 4, 512)):
        yield peak_of(name, rows, length)
    names = fitting()  # which empties the cache
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, int(free - 12 * GB)), dtype=torch.uint8, device="cuda")
    for name in names:
        try:
            small = load(folder_of(name), max_length=2048)
            batch = whole_rows(8, 2047)
            seconds = timed(small, batch, 1)
            note = "; ".join(small.info.notes)[:60] or "no note"
            said = f"{batch.tokens.size / seconds:,.0f} tokens/s in passes of {small._tokens_at_once} ({note})"
            del small
        except ModelError as error:
            said = str(error)[:120]
        yield measured(f"{native()}, {name}, 8 x 2048 with {min(free / GB, 12):.0f} GB free", "runs, or one line", said)
    del ballast


def peak_of(name: str, rows: int, length: int) -> Row:
    """The peak of a step of a named model, which is that of its largest pass."""
    import torch

    from macft.backends.torch.memory import kept_bytes

    check = f"{native()}, {name}, {rows} x {length}, peak"
    if name not in fitting():
        return skipped(check, "the weights do not fit")
    model, batch = load(folder_of(name), max_length=length), whole_rows(rows, length)
    if any("gradient_checkpointing" in note for note in model.info.notes):
        return skipped(check, "a row does not fit without gradient_checkpointing")
    with torch.autocast("cuda", sixteen()):
        kept = kept_bytes(model._split, 1, length) / length
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    timed(model, batch, 1)
    tokens = tokens_of_a_pass(batch, model._tokens_at_once)
    head = min(tokens * SHAPES[name]["vocab_size"] * 16, model._split.head_bytes)
    expected = held + 12 * model.info.trainable_parameters + kept * tokens + head
    peak = torch.cuda.max_memory_allocated()
    found = f"{peak / GB:.2f} GB, passes of {tokens} tokens"
    return outcome(check, f"{expected / GB:.2f} GB +-15 %", found, abs(peak / expected - 1) < 0.15)


def full() -> Iterator[Row]:
    """The peak of full fine-tuning."""
    torch = torch_or_skip()
    size = parameters(HALF_BILLION)
    expected = 16 * size + 2 * size + 24 * 66368 * 4096 + 2 * GB
    if "0.5B" not in fitting(expected - 2 * size):
        raise SkipCheck(f"{expected / GB:.0f} GB are not free")
    model = load(folder_of("0.5B"), full=True, max_length=1024)
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(model, whole_rows(4, 1024), 2)
    peak = torch.cuda.max_memory_allocated()
    found = f"{peak / GB:.1f} GB, {4096 / seconds:,.0f} tokens/s"
    yield outcome(
        f"{native()}, 0.5B, full fine-tuning, 4 x 1024",
        f"below {1.15 * expected / GB:.1f} GB",
        found,
        peak < 1.15 * expected,
    )


def speed() -> Iterator[Row]:
    """Tokens per second, as a share of what the card's products reach."""
    torch = torch_or_skip()
    from macft.errors import ModelError

    rate = matmul_rate()
    cases = [("0.5B", 4, 512, False), ("0.5B", 8, 1024, False), ("3B", 4, 512, False), ("3B", 8, 1024, False)]
    for name, rows, length, checkpoints in [*cases, ("3B", 8, 1024, True)]:
        check = f"{native()}, {name}, {rows} x {length}{', checkpointing' if checkpoints else ''}"
        if name not in fitting():
            yield skipped(check, "the weights do not fit")
            continue
        model = load(folder_of(name), max_length=length, gradient_checkpointing=checkpoints)
        torch.cuda.reset_peak_memory_stats()
        try:
            tokens = rows * length / timed(model, whole_rows(rows, length))
        except ModelError as error:
            yield skipped(check, str(error)[:120])
            continue
        share = tokens * flops_per_token(SHAPES[name], length) / rate
        yield measured(
            check,
            {"0.5B": "above 15 %", "3B": "above 30 %"}[name],
            f"{tokens:,.0f} tokens/s, {100 * share:.0f} % of {rate / 1e12:.0f} TFLOP/s, "
            f"{torch.cuda.max_memory_allocated() / GB:.1f} GB",
        )
    found = []
    model = load(folder_of("0.5B"), max_length=1024)
    for power in (23, 24, 25, 26):
        model._split._rows_at_once = max(1, (1 << power) // 151936)
        found.append(f"2^{power}: {8192 / timed(model, whole_rows(8, 1024), 3):,.0f}")
    yield measured(f"{native()}, 0.5B, 8 x 1024, logits at once", "", ", ".join(found))
    times = kernels(lambda: timed(model, whole_rows(8, 1024), 1))
    top = sorted(times.items(), key=lambda item: -item[1])[:5]
    yield measured("the five longest kernels", "", "; ".join(f"{key[:40]} {ms:.0f} ms" for key, ms in top))


def trl() -> Iterator[Row]:
    """TRL's SFTTrainer on the same shapes."""
    torch = torch_or_skip()
    try:
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, TrainerCallback
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise SkipCheck(f"TRL is not installed: {error}") from None

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_args, **_kwargs) -> None:
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    for name, rows, length in (("0.5B", 8, 1024), ("3B", 4, 512)):
        check = f"TRL, {native()}, {name}, {rows} x {length}"
        if name not in fitting():
            yield skipped(check, "the weights do not fit")
            continue
        torch.cuda.reset_peak_memory_stats()
        model = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=sixteen(), device_map={"": "cuda"})
        tokens = whole_rows(rows * 8, length - 1).tokens.tolist()
        clock = Clock()
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(FOLDER / "trl"),
                per_device_train_batch_size=rows,
                max_steps=7,
                max_length=length,
                bf16=native() == "bfloat16",
                fp16=native() == "float16",
                gradient_checkpointing=False,
                report_to="none",
                logging_strategy="no",
                save_strategy="no",
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
            processing_class=processing_class(),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            callbacks=[clock],
        )
        try:
            trainer.train()
        except torch.cuda.OutOfMemoryError:
            yield skipped(check, "TRL is out of memory")
            continue
        seconds = (clock.times[-1] - clock.times[2]) / (len(clock.times) - 3)
        peak = torch.cuda.max_memory_allocated() / GB
        yield measured(check, "", f"{rows * length / seconds:,.0f} tokens/s, {peak:.1f} GB")
        del trainer, model


def processing_class():
    """A tokenizer of 199 letters, which TRL asks for and never uses."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {chr(0x4E00 + i): i for i in range(199)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=chr(0x4E00)))
    first = chr(0x4E00)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=first, pad_token=first, unk_token=first)
