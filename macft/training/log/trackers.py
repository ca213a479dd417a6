"""Open the experiment trackers that `report_to` names; the training report hands them its rows."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from macft.errors import MacftError, MissingPackageError, UsageError

# report_to name -> the packages that can serve it, best first
TRACKERS: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "swanlab": ("swanlab",),
}


class Reporter(Protocol):
    """A place outside the run folder that receives every logged row."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_reporters(names: Sequence[str]) -> dict[str, str]:
    """The package that serves each reporter `report_to` names; `none` stands for no reporter.

    Raises UsageError for an unknown name and MissingPackageError, with the command, for a package
    that is not installed.
    """
    return {name: _installed_package(name) for name in dict.fromkeys(names) if name != "none"}


def open_reporters(
    names: Sequence[str], output_dir: Path, run_name: str, settings: Mapping[str, Any]
) -> list[Reporter]:
    """The reporters that `report_to` names; raises as `check_reporters` does, before any is opened."""
    packages = check_reporters(names)
    return [_open(name, package, output_dir, run_name, settings) for name, package in packages.items()]


def _open(name: str, package: str, output_dir: Path, run_name: str, settings: Mapping[str, Any]) -> Reporter:
    try:
        if name == "tensorboard":
            return _TensorBoard(package, output_dir / "tensorboard")
        if name == "wandb":
            return _Wandb(output_dir, run_name, settings)
        return _SwanLab(output_dir, run_name, settings)
    except Exception as error:  # the trackers raise their own kinds: no login, no network, bad settings
        raise MacftError(f"report_to: {name} could not start: {error}; fix it or remove it") from error


class _TensorBoard:
    def __init__(self, package: str, folder: Path) -> None:
        self._plain_writer: Any = None
        self._x_writer: Any = None
        if package == "tensorboard":
            # what torch.utils.tensorboard wraps; used directly so that torch is not needed
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._plain_writer = EventFileWriter(str(folder))
        else:
            self._x_writer = importlib.import_module("tensorboardX").SummaryWriter(str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        scalars = _tracker_names(values)
        if self._x_writer:
            for key, value in scalars.items():
                self._x_writer.add_scalar(key, value, step)
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=key, simple_value=value) for key, value in scalars.items()])
        self._plain_writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))

    def close(self) -> None:
        (self._plain_writer or self._x_writer).close()


class _Wandb:
    def __init__(self, output_dir: Path, run_name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        # wandb reads its project from WANDB_PROJECT when none is given
        self._run = wandb.init(name=run_name, dir=str(output_dir), config=dict(settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # the step goes along as a value: wandb drops rows whose step it has already seen
        self._run.log({**_tracker_names(values), "train/global_step": step})

    def close(self) -> None:
        self._run.finish()


class _SwanLab:
    def __init__(self, output_dir: Path, run_name: str, settings: Mapping[str, Any]) -> None:
        import swanlab

        logdir = str(output_dir / "swanlab")
        self._run: Any = swanlab.init(experiment_name=run_name, config=dict(settings), logdir=logdir)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(_tracker_names(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _installed_package(tracker: str) -> str:
    if tracker not in TRACKERS:
        raise UsageError(f"report_to: found {tracker!r}, expected none or some of {', '.join(TRACKERS)}")
    for package in TRACKERS[tracker]:
        if importlib.util.find_spec(package):
            return package
    package = TRACKERS[tracker][0]
    raise MissingPackageError(
        f"report_to: {tracker} needs {package}, which is not installed; run: pip install {package}"
    )


def _tracker_names(values: Mapping[str, float]) -> dict[str, float]:
    # the names that users of transformers know: eval/loss, train/loss
    return {f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}": value for key, value in values.items()}
