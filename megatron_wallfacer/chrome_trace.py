"""Write timelines as files of the Chrome trace format, which Perfetto opens, with a description of each rank."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from socket import gethostname
from typing import Any

from megatron_wallfacer.engine.timeline import ROWS, TimelineEvent

#: Largest number of ranks that a timeline file may declare. The limit protects against malformed files.
MOST_RANKS = 1 << 20


def trace_events(rank: int, events: Iterable[TimelineEvent]) -> list[dict[str, object]]:
    """Return the events of a rank in the Chrome trace format.

    A trace viewer shows the rank as a process, and each row of its timeline as a thread. The rows in
    :data:`megatron_wallfacer.engine.timeline.ROWS` are first, and all other rows follow by name.
    """
    events = list(events)
    rows = [*ROWS, *sorted({event.row for event in events} - set(ROWS))]
    named = [("process_name", 0, f"rank {rank}"), *(("thread_name", i, row) for i, row in enumerate(rows))]
    trace: list[dict[str, object]] = [
        {"ph": "M", "pid": rank, "tid": row, "name": kind, "args": {"name": name}} for kind, row, name in named
    ]
    for event in events:
        times = {"ts": event.start * 1e6, "dur": (event.end - event.start) * 1e6}
        place = {"pid": rank, "tid": rows.index(event.row)}
        # Complete events of one thread must not overlap, but transfers of one channel may: they are asynchronous.
        if event.row in ROWS:
            trace.append({"ph": "X", **place, "name": event.name, **times})
            continue
        ends = {"cat": event.row, "id": f"{rank} {event.row} {event.name} {event.start}", "name": event.name}
        trace.append({"ph": "b", "ts": event.start * 1e6, **place, **ends})
        trace.append({"ph": "e", "ts": event.end * 1e6, **place, **ends})
    return trace


def write_trace(events: Sequence[dict[str, object]], path: Path, about: Mapping[str, object] | None = None) -> None:
    """Write events of the Chrome trace format as a JSON file, with ``about`` as metadata that viewers show.

    Missing parent folders are created.
    """
    trace = {"traceEvents": events, "displayTimeUnit": "ms"} | ({"otherData": dict(about)} if about else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(trace))


@dataclass(frozen=True)
class TraceSource:
    """The process that recorded a timeline file.

    Attributes:
        rank: global rank of the process.
        ranks: number of ranks of the job.
        run: identifier that is equal on all ranks of a run and differs between runs.
        device: device type, ``cpu`` or ``cuda``.
        host: name of the node. The ranks of a node share the monotonic clock that times the events.
        wall_s: seconds of the node's wall clock minus seconds of its monotonic clock.
    """

    rank: int
    ranks: int
    run: str
    device: str
    host: str
    wall_s: float

    @classmethod
    def here(cls, rank: int, ranks: int, run: str, device: str) -> TraceSource:
        """Return the description of this process."""
        return cls(rank, ranks, run, device, gethostname(), time.time() - time.monotonic())

    def as_dict(self) -> dict[str, Any]:
        """Return the metadata for :func:`megatron_wallfacer.chrome_trace.write_trace`."""
        return asdict(self)

    @classmethod
    def read(cls, about: Mapping[str, Any]) -> TraceSource:
        """Return the description of a process from the metadata of a timeline file.

        A field that is missing or invalid raises KeyError, TypeError or ValueError.
        """
        kinds = {"rank": int, "ranks": int, "run": str, "device": str, "host": str, "wall_s": float}
        found = cls(**{name: kind(about[name]) for name, kind in kinds.items()})
        if not 0 <= found.rank < found.ranks <= MOST_RANKS or not isfinite(found.wall_s):
            raise ValueError(f"rank {found.rank} of {found.ranks}, wall_s {found.wall_s}")
        return found
