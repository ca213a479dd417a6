"""Write and read checkpoints: trained parameters, optimizer moments and the position in the data, without pickle."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.numpy import load_file

from macft.errors import MacftError
from macft.files import new_dir, write_json
from macft.process_group import ProcessGroup
from macft.training.early_stopping import BestEvaluation
from macft.training.log.report import StepRecord
from macft.weights.adapters.peft import State
from macft.weights.tensors.safetensors import write_state

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` optimizer steps."""

    data_hash: str  # of the tokenized examples and the plan: the position means nothing on other data
    step: int = 0
    total_tokens: int = 0
    loss_sum: float = 0.0  # of all step losses so far
    seconds: float = 0.0  # spent in steps
    unlogged: tuple[StepRecord, ...] = ()  # steps whose row of the log is still to come
    best: BestEvaluation = field(default_factory=BestEvaluation)  # the best evaluation so far
    stream_digest: str = ""  # of the examples taken from a stream, which `data_hash` cannot know


def save_checkpoint(
    output_dir: Path,
    progress: Progress,
    optimizer_state: State | None,
    write_model: Callable[[Path], None],
    group: ProcessGroup,
    *,
    keep: int | None,
    spared: int | None = None,
) -> Path:
    """Write checkpoint-STEP, then delete the oldest beyond `keep`; it counts once its manifest is there.

    The checkpoint of step `spared` is never deleted for being old. Checkpoints of later steps are
    deleted: the run was taken back to before them and has diverged from them. `write_model` puts the model
    files into the folder it is given. Without `optimizer_state` the checkpoint cannot be resumed from. Of several
    processes only the main one writes.
    """
    path = output_dir / f"checkpoint-{progress.step}"
    if not group.is_main:
        return path
    with new_dir(path) as folder:
        write_model(folder)
        if optimizer_state is not None:
            write_state(folder / OPTIMIZER, optimizer_state)
        write_json(folder / TRAINER_STATE, asdict(progress))
        files = sorted(file for file in folder.iterdir() if file.is_file())
        write_json(folder / MANIFEST, {file.name: _fingerprint(file) for file in files})
    others = list_checkpoints(output_dir)
    newest = others.index(path)
    aged = others[: max(0, newest + 1 - keep)] if keep is not None else []
    for old in others[newest + 1 :] + [folder for folder in aged if folder.name != f"checkpoint-{spared}"]:
        # without its manifest a half-deleted checkpoint does not count
        (old / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(old)
    return path


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first, complete or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def find_checkpoint(output_dir: Path, expected: bool | str) -> Path:
    """The checkpoint to resume from: a given path, or the newest complete one in `output_dir`.

    Raises MacftError when there is none, or when the given one is damaged (what is wrong with it).
    """
    if isinstance(expected, str):
        path = Path(expected).expanduser()
        if not path.is_dir():
            raise MacftError(f"resume_from_checkpoint: {expected} is not a directory; pass a checkpoint-N directory")
        if problem := checkpoint_problem(path):
            raise MacftError(f"resume_from_checkpoint: {path}: {problem}")
        return path
    problems = []
    for path in reversed(list_checkpoints(output_dir)):
        problem = checkpoint_problem(path)
        if problem is None:
            return path
        problems.append(f"{path.name}: {problem}")
    detail = f" ({'; '.join(problems)})" if problems else ""
    raise MacftError(
        f"resume_from_checkpoint: {output_dir} holds no checkpoint to resume from{detail}; "
        "remove the key to start again"
    )


def checkpoint_problem(path: Path) -> str | None:
    """What keeps a checkpoint from being used, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {MANIFEST}: this is not a checkpoint, or one that was not completely written"
    except ValueError:
        return f"{MANIFEST} is not JSON"
    if not isinstance(manifest, dict):
        return f"{MANIFEST} has changed since it was written"
    for name, expected in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _fingerprint(path / name) != expected:
            return f"{name} has changed since it was written"
    if OPTIMIZER not in manifest:
        return f"no {OPTIMIZER}: it was written with save_only_model"
    return None


def read_progress(path: Path) -> Progress:
    """Where the run stood."""
    state = json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
    state["unlogged"] = tuple(StepRecord(**record) for record in state["unlogged"])
    state["best"] = BestEvaluation(**state.get("best", {}))
    return Progress(**state)


def read_optimizer_state(path: Path) -> State:
    """The moments, under canonical names."""
    return dict(load_file(path / OPTIMIZER))


def _fingerprint(file: Path) -> dict[str, str | int]:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
