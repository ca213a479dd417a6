"""Warn when a model never learned the token with which its chat template ends answers."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes  # noqa: F401 (numpy reads bfloat16 only once this is imported)
import numpy as np
from safetensors import SafetensorError, safe_open

from macft.data.templates.chat_template import ChatTemplate, template_end_ids
from macft.data.tokenization.tokenizer import Tokenizer
from macft.weights.folder import model_files, weight_files

# Names of the matrix that turns hidden states into logits, the likelier first: tied models have no head.
_OUTPUT_NAMES = ("lm_head.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight")
_SAMPLE = 256  # ordinary rows, to know how far apart rows lie
_MOST_REFERENCES = 512
# Rows this near, in units of the usual distance, were never told apart by training.
_SAME = 0.1


def untrained_end_token_alarm(template: ChatTemplate, tokenizer: Tokenizer, folder: Path) -> str | None:
    """Whether, in a run that leaves the embeddings as they are (LoRA), the template ends answers with an unknown token.

    Suspect is an end token that neither config.json nor generation_config.json nor the tokenizer
    names as an end. Its row of output weights then decides: silence if other special or unused
    tokens share one row and this row differs, an alarm otherwise.
    Not seen: a token that is named as an end but was not trained. Possibly wrong: an instruct
    model that does not name its end token and whose rows cannot be read (quantized) or compared.
    """
    ends = template_end_ids(template, tokenizer)
    if not ends or ends & tokenizer.eos_ids:
        return None
    end = min(ends)
    learned = _is_learned(folder, end, tokenizer)
    if learned:
        return None
    why = (
        "its output weights are those of unused tokens: this base model never learned it"
        if learned is False
        else "a base model has rarely learned it"
    )
    eos = tokenizer.special_map.get("eos_token", "the model's own end token")
    return (
        f"the chat template ends answers with {tokenizer.decode([end], skip_special=False)}, the model with {eos}; "
        f"{why}, and LoRA cannot teach it, so answers may never end; take the instruct model, "
        f"template: empty (ends with {eos}), or finetuning_type: full"
    )


def _is_learned(folder: Path, end: int, tokenizer: Tokenizer) -> bool | None:
    """Whether a token's row of output weights differs from rows that no training has touched; None: not known."""
    rows = _OutputRows.find(folder)
    if rows is None or end >= rows.count:
        return None
    special = tokenizer.special_ids - {end}
    unused = range(tokenizer.vocab_size, rows.count)
    references = [id_ for id_ in [*sorted(special), *unused] if id_ < rows.count][:_MOST_REFERENCES]
    known = min(tokenizer.vocab_size, rows.count)
    ordinary = [id_ for id_ in range(0, known, max(1, known // _SAMPLE)) if id_ not in special and id_ != end]
    if len(references) < 2 or len(ordinary) < 2:
        return None
    sample = rows.read(ordinary)
    usual = float(np.median(np.linalg.norm(sample[1:] - sample[:-1], axis=1)))
    others = rows.read(references)
    if _count_near(others, rows.read([end])[0], usual) >= 2:
        return False
    # three rows in one place are rows that nothing has moved
    return True if max(_count_near(others, row, usual) for row in others) >= 3 else None


def _count_near(rows: np.ndarray, row: np.ndarray, usual: float) -> int:
    return int((np.linalg.norm(rows - row, axis=1) < _SAME * usual).sum())


class _OutputRows:
    """Single rows of the output matrix of a model folder, without reading the rest."""

    def __init__(self, path: Path, name: str, count: int) -> None:
        self._path = path
        self._name = name
        self.count = count

    @staticmethod
    def find(folder: Path) -> _OutputRows | None:
        """Find the matrix in a folder; None if it has none in floating point."""
        found: dict[str, _OutputRows] = {}
        for path in model_files(folder)[0] if any(weight_files(folder)) else ():
            try:
                with safe_open(path, framework="numpy") as file:
                    for name in file.keys():  # noqa: SIM118 (this is not a dict)
                        expected = next((end for end in _OUTPUT_NAMES if name == end or name.endswith(f".{end}")), None)
                        if expected is None:
                            continue
                        tensor = file.get_slice(name)
                        if tensor.get_dtype() in ("F32", "F16", "BF16"):
                            found[expected] = _OutputRows(path, name, tensor.get_shape()[0])
            except (OSError, SafetensorError):
                return None
        return next((found[name] for name in _OUTPUT_NAMES if name in found), None)

    def read(self, ids: list[int]) -> np.ndarray:
        """float32 [ids, width]."""
        with safe_open(self._path, framework="numpy") as file:
            tensor = file.get_slice(self._name)
            return np.concatenate([tensor[id_ : id_ + 1].astype(np.float32) for id_ in ids])
