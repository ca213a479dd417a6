"""Say which process of a run this one is."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from macft.errors import UsageError

# How many processes were started together, in the words of each launcher. Slurm's other counts are those of the job,
# which one process may have to itself.
_SIZES = {
    "WORLD_SIZE": "torchrun, accelerate launch or deepspeed",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MLX_WORLD_SIZE": "mlx.launch",
    "SLURM_STEP_NUM_TASKS": "srun",
}

_HOSTFILE = "MLX_HOSTFILE"


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train one model together, each with its own part of every step."""

    rank: int  # of this process, from 0
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and talks to the user."""
        return self.rank == 0


ONE_PROCESS = ProcessGroup(rank=0, world_size=1)


def find_group() -> ProcessGroup:
    """The group of this process; raises UsageError where a launcher started several, which are not served yet."""
    sizes = {name: os.environ.get(name, "") for name in _SIZES}
    sizes[_HOSTFILE] = _ring_size()
    for name, size in sizes.items():
        if size.isdecimal() and int(size) > 1:
            launcher = _SIZES.get(name, "mlx.launch")
            raise UsageError(
                f"{name} says that {launcher} started {size} processes, and macft trains in one (WORLD_SIZE 1), on one "
                "GPU; start it once, without a launcher: macft train CONFIG.yaml"
            )
    return ONE_PROCESS


def _ring_size() -> str:
    """The number of hosts in the file of mlx.launch, which names no size; empty without one."""
    try:
        return str(len(json.loads(Path(os.environ[_HOSTFILE]).read_text(encoding="utf-8"))))
    except (KeyError, OSError, ValueError, TypeError):
        return ""
