"""Compare the logits of a model before and after a conversion, on a fixed text."""

from __future__ import annotations

import gc
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from macft.backends import choose_backend, is_installed, load_logits_module
from macft.backends.adapters import spec_of_adapter
from macft.backends.base import MergedAdapter
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.engines import BACKENDS
from macft.errors import MacftError, MissingPackageError, ModelError
from macft.weights.adapters.formats import adapter_format
from macft.weights.adapters.peft import Adapter
from macft.weights.layouts.litgpt import is_litgpt
from macft.weights.model_config import read_config
from macft.weights.quantization.affine import quantization_of
from macft.weights.source import open_model

logger = logging.getLogger("macft")

TEXT = (
    "The capital of France is Paris, and 2 + 2 = 4.\n中国的首都是北京。今天天气怎么样？\n"
    "Привет, мир! Γειά σου. 日本語のテキスト、한국어 문장. مرحبا\ndef f(x): return x ** 2  # naïve café 🙂\n"
)
_MAX_TOKENS = 160
_QUANTIZED_CAP = 1.2
_ROUNDED = {"float16": 0.01, "bfloat16": 0.05}


class VerifyError(MacftError):
    """A result does not compute what its source computes."""


@dataclass(frozen=True)
class Subject:
    """A model to load: a folder in HF, MLX or litgpt layout, and adapters on it, in order."""

    folder: Path
    adapters: tuple[Adapter, ...] = ()


@dataclass(frozen=True)
class Tolerance:
    """How far apart logits may be, and why.

    `limit` is for the largest difference as a share of the largest logit if `is_exact`, and otherwise for the
    root mean square of all differences as a share of that of the logits, both taken about each position's mean.
    """

    kind: str
    limit: float
    is_exact: bool


EXACT = Tolerance("the same numbers", 1e-4, is_exact=True)  # for a result that holds the source's own numbers


@dataclass(frozen=True)
class Agreement:
    """Two sets of logits [T, V] compared; shares are of the first set's own size, `top1` of positions."""

    positions: int
    largest: float
    largest_share: float
    rms_share: float
    top1: float


def check_engine(source: Path) -> None:
    """MissingPackageError, before any work, when no installed engine could load source and result."""
    readers = [engine for engine in BACKENDS.values() if engine.reads_litgpt]
    has_reader = any(is_installed(engine.name) for engine in readers)
    if is_litgpt(source) and not (has_reader and importlib.util.find_spec("litgpt")):
        raise MissingPackageError(
            f"--verify of a litgpt checkpoint needs {readers[0].name} and litgpt: {readers[0].install} litgpt, "
            "or leave --verify out"
        )
    choose_backend("auto")


def tolerance_of(result: Path, *, is_rounded: bool) -> Tolerance:
    """The tolerance for a result; `is_rounded`: its numbers are not the source's own.

    Exact: one engine sums the same float32 numbers, at most in another order (1e-5 measured). Rounded once to
    16 bits: six times what SmolLM2-135M loses (0.008 in bfloat16, 0.0008 in float16). Quantized to b bits:
    SmolLM2-135M, which is small and easily hurt, loses 8 / 2^b (0.03 at 8 bits, 0.5 at 4); twice that is allowed, up
    to 1.2, as unrelated logits are 1.4 apart. A wrong name, order or scale exceeds all of these.
    """
    quantization = quantization_of(read_config(result))
    if quantization is not None:
        bits = min([quantization.bits, *(bits for bits, _ in quantization.layers.values())])
        return Tolerance(f"quantized to {bits} bits", min(_QUANTIZED_CAP, 16 / 2**bits), is_exact=False)
    dtypes = {tensor.dtype.name for tensor in open_model(result).tensors if len(tensor.shape) > 1}
    limits = {dtype: _ROUNDED[dtype] for dtype in dtypes if dtype in _ROUNDED}
    if is_rounded and limits:
        dtype = max(limits, key=lambda name: limits[name])
        return Tolerance(f"rounded to {dtype}", limits[dtype], is_exact=False)
    return EXACT


def verify(source: Subject, result: Subject, tolerance: Tolerance, *, prefers: str = "auto") -> str:
    """Load both, one after the other, and compare them; returns one line that says how far apart they are.

    `prefers` is the engine to try first if it is installed. Raises VerifyError above the tolerance, ModelError when
    no engine can load one of the two.
    """
    tokens = _tokens(result.folder)
    first_engine, first = logits_of(source, tokens, prefers)
    second_engine, second = logits_of(result, tokens, prefers)
    if first.shape != second.shape:
        raise VerifyError(
            f"{_name(result)}: verification failed: logits {list(second.shape)}, of the source {list(first.shape)}"
        )
    agreement = compare_logits(first, second)
    by = first_engine if first_engine == second_engine else f"{first_engine} and {second_engine}"
    said = (
        f"the largest difference of {agreement.positions} positions is {agreement.largest:.2g} "
        f"({agreement.largest_share:.2g} of the largest logit), {agreement.rms_share:.2g} of the logits' spread, top-1 "
        f"agrees at {agreement.top1:.1%}"
    )
    found = agreement.largest_share if tolerance.is_exact else agreement.rms_share
    of = "of the largest logit" if tolerance.is_exact else "of the spread"
    expected = f"{tolerance.kind}: up to {tolerance.limit:g} {of}"
    if not found <= tolerance.limit:  # NaN fails too
        raise VerifyError(
            f"{_name(result)}: verification with {by} failed: {said}; expected {expected}; do not use it; report this"
        )
    return f"verified with {by}: {said} ({expected})"


def logits_of(subject: Subject, tokens: Sequence[int], prefers: str = "auto") -> tuple[str, np.ndarray]:
    """(engine, logits [T, V]) by the first engine that can load the subject."""
    problems = []
    for engine in _engines(subject, prefers):
        gc.collect()  # never two models in memory at the same time
        try:
            adapters = _adapters(subject, BACKENDS[engine].adapter_format)
            found = load_logits_module(engine).logits(subject.folder, adapters, tokens)
            return "litgpt" if is_litgpt(subject.folder) else engine, found
        except MacftError as error:
            problems.append(error)
    raise ModelError(f"{_name(subject)}: cannot be verified, as no installed engine loads it: {problems[0]}")


def compare_logits(first: np.ndarray, second: np.ndarray) -> Agreement:
    """Compare logits [T, V]; a constant added to all logits of a position counts only in `largest`."""
    difference = second - first
    spread = first - first.mean(axis=-1, keepdims=True)
    moved = difference - difference.mean(axis=-1, keepdims=True)
    largest = float(np.abs(difference).max())
    return Agreement(
        positions=first.shape[0],
        largest=largest,
        largest_share=largest / max(float(np.abs(first).max()), 1e-30),
        rms_share=float(np.sqrt(np.square(moved).mean() / max(np.square(spread).mean(), 1e-30))),
        top1=float((first.argmax(-1) == second.argmax(-1)).mean()),
    )


def _name(subject: Subject) -> Path:
    return subject.adapters[-1].folder if subject.adapters else subject.folder


def _engines(subject: Subject, prefers: str) -> list[str]:
    """The engines to try: first the one whose library reads all adapters itself, as our own reading proves little."""
    if is_litgpt(subject.folder):
        return [name for name, engine in BACKENDS.items() if engine.reads_litgpt]
    first = prefers if prefers != "auto" and is_installed(prefers) else choose_backend("auto")
    engines = [first, *(name for name in BACKENDS if name != first and is_installed(name))]
    formats = {adapter_format(adapter.folder) for adapter in subject.adapters}
    return sorted(engines, key=lambda name: formats != {BACKENDS[name].adapter_format})


def _tokens(folder: Path) -> list[int]:
    """The tokens of the text; for a folder without a tokenizer, ids spread over the vocabulary."""
    size = int(read_config(folder).get("vocab_size") or 0)
    try:
        found = [token for token in load_tokenizer(folder).encode(TEXT).ids if not size or token < size]
    except ModelError:
        found = []
    return found[:_MAX_TOKENS] or [int(token) for token in np.linspace(0, max(0, size - 1), 64)]


def _adapters(subject: Subject, native_format: str) -> list[MergedAdapter | Path]:
    """Adapters as folders where the engine reads them itself, the others as we read them."""
    found: list[MergedAdapter | Path] = []
    for adapter in subject.adapters:
        is_native = adapter_format(adapter.folder) == native_format
        if is_native and (native_format == "peft" or len(subject.adapters) == 1):
            found.append(adapter.folder)
        elif adapter.own.names:
            raise ModelError(f"{adapter.folder}: only PEFT loads tensors beside LoRA: pip install 'macft[torch]'")
        else:
            found.append(MergedAdapter(spec_of_adapter(adapter), adapter.state))
    return found
