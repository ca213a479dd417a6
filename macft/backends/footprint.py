"""Compute what LoRA training takes of a device's memory, and which models fit into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from macft.backends.memory import BYTES_PER_TRAINED, USABLE

GIB = 1 << 30
ROW_TOKENS = 2048  # `cutoff_len` as it is where nobody sets it
RANK = 8
# In the weights of a block; a group of 64 numbers in 4 or 8 bits carries 4 bytes more.
_BYTES_PER_WEIGHT = {16: 2.0, 8: 1 + 4 / 64, 4: 0.5 + 4 / 64}
# An adapter's number in float32 and in the compute type, and what a step holds of it.
_BYTES_PER_ADAPTER_NUMBER = 4 + 2 + BYTES_PER_TRAINED
_BYTES_PER_LOGIT = 16  # twice in 16 bits, three times in float32
_MOST_HEAD_BYTES, _HEAD_SHARE, _LEAST_HEAD_ROWS = 1 << 30, 1 / 16, 128  # of what the weights leave free
_CUDA_CONTEXT = 0.6e9
_LEFT_TO_MACOS = 3e9


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that decide what it takes."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool
    normalizes_heads: bool = False  # queries and keys, as Qwen3 does

    @property
    def _queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def _keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def _matrices(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of the matrices of one block."""
        attention = [(self._queries, self.hidden), *[(self._keys, self.hidden)] * 2, (self.hidden, self._queries)]
        return [*attention, *[(self.intermediate, self.hidden)] * 2, (self.hidden, self.intermediate)]

    @property
    def block_parameters(self) -> int:
        """Parameters of all blocks, without the few of their norms."""
        return self.layers * sum(outputs * inputs for outputs, inputs in self._matrices)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, and of the head where it is another matrix."""
        return self.vocabulary * self.hidden * (1 if self.is_tied else 2)

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of an adapter on every matrix of the blocks."""
        return self.layers * rank * sum(outputs + inputs for outputs, inputs in self._matrices)

    def kept_by_layer(self, rank: int) -> int:
        """Bytes of a token that one block keeps for the backward pass in 16 bits, with attention in one kernel.

        Each norm keeps its input in float32 and its result, a product of LoRA its input and A's output.
        """
        norms = 12 * self.hidden + 8
        attention = 4 * self._queries + 4 * self._keys + 4 * self.heads
        if self.normalizes_heads:
            norms += 4 * (self._queries + self._keys) + 4 * (self.heads + self.kv_heads)
        return norms + attention + 8 * self.intermediate + 2 * len(self._matrices) * rank


@dataclass(frozen=True)
class Device:
    """The memory that training may use, and how the engine computes there."""

    name: str
    memory: float  # bytes that training may take in all
    keeps_scores: bool  # attention keeps the probabilities of all pairs of tokens, as MLX does in training


def card(name: str, total: float) -> Device:
    """An NVIDIA GPU with so many bytes."""
    return Device(name, total - _CUDA_CONTEXT, keeps_scores=False)


def mac(name: str, total: float, working_set: float | None = None) -> Device:
    """A Mac with so many bytes, of which its GPU may use `working_set`; by rule where that is not known."""
    if working_set is None:
        working_set = total * (2 / 3 if total < 36 * GIB else 3 / 4)
    return Device(name, min(working_set, total - _LEFT_TO_MACOS), keeps_scores=True)


def training_memory(shape: ModelShape, device: Device, *, bits: int, checkpoints: bool) -> float:
    """Bytes that a training step over one row of ROW_TOKENS takes, with an adapter of rank RANK on every matrix."""
    weights = shape.block_parameters * _BYTES_PER_WEIGHT[bits] + shape.embedding_parameters * 2
    adapter = shape.adapter_parameters(RANK) * _BYTES_PER_ADAPTER_NUMBER
    layer = shape.kept_by_layer(RANK) + (2 * shape.heads * ROW_TOKENS if device.keeps_scores else 0)
    kept = shape.layers * 2 * shape.hidden + layer if checkpoints else shape.layers * layer
    least_head = _BYTES_PER_LOGIT * _LEAST_HEAD_ROWS * shape.vocabulary
    head = max(least_head, min(_MOST_HEAD_BYTES, _HEAD_SHARE * (device.memory - weights)))
    return weights + adapter + head + kept * ROW_TOKENS / USABLE


def largest(
    device: Device, *, bits: int, checkpoints: bool, shapes: Sequence[ModelShape] | None = None
) -> ModelShape | None:
    """The last of the shapes, which go from small to large, that fits."""
    fitting = [
        shape
        for shape in (SHAPES if shapes is None else shapes)
        if training_memory(shape, device, bits=bits, checkpoints=checkpoints) <= device.memory
    ]
    return fitting[-1] if fitting else None


def fits_text(device: Device) -> str:
    """One line of what LoRA training fits into a device."""
    parts = []
    for bits in (16, 4):
        name, plain = (_name(largest(device, bits=bits, checkpoints=checkpoints)) for checkpoints in (True, False))
        without = "" if plain == name else f" ({plain} without gradient_checkpointing)"
        parts.append(f"{name} in {bits} bits{without}")
    return f"LoRA, rows of {ROW_TOKENS} tokens, computed: up to {', '.join(parts)}"


def _name(shape: ModelShape | None) -> str:
    return "none" if shape is None else shape.name


def _qwen3(name: str, layers: int, hidden: int, intermediate: int, heads: int, *, is_tied: bool) -> ModelShape:
    return ModelShape(name, layers, hidden, intermediate, heads, 8, 128, 151_936, is_tied, normalizes_heads=True)


# Source: config.json of each model. From small to large.
SHAPES = (
    _qwen3("Qwen3-0.6B", 28, 1024, 3072, 16, is_tied=True),
    _qwen3("Qwen3-1.7B", 28, 2048, 6144, 16, is_tied=True),
    _qwen3("Qwen3-4B", 36, 2560, 9728, 32, is_tied=True),
    _qwen3("Qwen3-8B", 36, 4096, 12_288, 32, is_tied=False),
    _qwen3("Qwen3-14B", 40, 5120, 17_408, 40, is_tied=False),
    _qwen3("Qwen3-32B", 64, 5120, 25_600, 64, is_tied=False),
    ModelShape("Llama-3.3-70B", 80, 8192, 28_672, 64, 8, 128, 128_256, is_tied=False),
)
DEVICES = (
    *(mac(f"Mac, {size} GB", size * GIB) for size in (8, 16, 24, 36, 48, 64, 128)),
    card("RTX 3060, 12 GB", 12 * GIB),
    card("T4, 15 GB", 15 * GIB),
    card("RTX 4080, 16 GB", 16 * GIB),
    card("RTX 3090, 4090, 24 GB", 24 * GIB),
    card("RTX 5090, 32 GB", 32 * GIB),
    card("L40S, 48 GB", 48 * GIB),
    card("A100, H100, 80 GB", 80 * GIB),
    card("H200, 141 GB", 139.8 * GIB),
)
