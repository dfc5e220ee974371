"""The source of a timeline file: its rank, run and node, and the offset of its clock."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from socket import gethostname
from typing import Any

#: Limit of the ranks in a file, beyond any job: files are not trusted.
MOST_RANKS = 1 << 20


@dataclass(frozen=True)
class TraceSource:
    """The source of a timeline file.

    Attributes:
        rank: global rank of the process.
        ranks: number of ranks of the job.
        run: text that is equal on all ranks of a run, and different in every run.
        device: ``cpu`` or ``cuda``.
        host: name of the node. Its ranks share the monotonic clock that times the events.
        wall_s: wall clock of the node minus its monotonic clock, in seconds.
    """

    rank: int
    ranks: int
    run: str
    device: str
    host: str
    wall_s: float

    @classmethod
    def here(cls, rank: int, ranks: int, run: str, device: str) -> TraceSource:
        """Return the source of a timeline that this process records now."""
        return cls(rank, ranks, run, device, gethostname(), time.time() - time.monotonic())

    def as_dict(self) -> dict[str, Any]:
        """Return the metadata for :func:`megatron_wallfacer.chrome_trace.write_trace`."""
        return asdict(self)

    @classmethod
    def read(cls, about: Mapping[str, Any]) -> TraceSource:
        """Return the source that :meth:`as_dict` described.

        Raises:
            KeyError: A field is missing.
            ValueError: A field has an invalid value.
            TypeError: A field has an invalid type.
        """
        kinds = {"rank": int, "ranks": int, "run": str, "device": str, "host": str, "wall_s": float}
        found = cls(**{name: kind(about[name]) for name, kind in kinds.items()})
        if not 0 <= found.rank < found.ranks <= MOST_RANKS or not isfinite(found.wall_s):
            raise ValueError(f"rank {found.rank} of {found.ranks}, wall_s {found.wall_s}")
        return found
