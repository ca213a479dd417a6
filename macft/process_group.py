"""Say which process of a run this one is."""

from __future__ import annotations

from dataclasses import dataclass


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
