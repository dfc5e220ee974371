"""Where a time line was recorded: the rank, the run, and how the clock of its host stands to those of others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from socket import gethostname
from typing import Any

#: More ranks than any job has: a file may say anything.
MOST_RANKS = 1 << 20


@dataclass(frozen=True)
class Origin:
    """What the file of a time line says about itself.

    Attributes:
        rank: of the process, over all.
        ranks: of the job.
        run: the same text on all ranks of a run, and another in every run.
        device: ``cpu`` or ``cuda``.
        host: the machine. Ranks of one host share its monotonic clock, in whose seconds events are told.
        wall_s: what the wall clock of the host is ahead of its monotonic clock.
    """

    rank: int
    ranks: int
    run: str
    device: str
    host: str
    wall_s: float

    @classmethod
    def here(cls, rank: int, ranks: int, run: str, device: str) -> Origin:
        """That of this process, now."""
        return cls(rank, ranks, run, device, gethostname(), time.time() - time.monotonic())

    def as_dict(self) -> dict[str, Any]:
        """For :func:`megatron_wallfacer.engine.timeline.write_trace`."""
        return asdict(self)

    @classmethod
    def read(cls, about: Mapping[str, Any]) -> Origin:
        """What :meth:`as_dict` wrote.

        Raises:
            KeyError: something is missing.
            ValueError: something has a value that it cannot have.
            TypeError: likewise.
        """
        kinds = {"rank": int, "ranks": int, "run": str, "device": str, "host": str, "wall_s": float}
        found = cls(**{name: kind(about[name]) for name, kind in kinds.items()})
        if not 0 <= found.rank < found.ranks <= MOST_RANKS or not isfinite(found.wall_s):
            raise ValueError(f"rank {found.rank} of {found.ranks}, wall_s {found.wall_s}")
        return found
