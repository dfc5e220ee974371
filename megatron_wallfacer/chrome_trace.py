"""Timelines as files of the Chrome trace format, which Perfetto opens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_wallfacer.engine.timeline import ROWS, TimelineEvent


def trace_events(rank: int, events: Iterable[TimelineEvent]) -> list[dict[str, object]]:
    """Return the events of a rank in the Chrome trace format: a process for the rank, a thread for each row.

    Args:
        rank: rank of the process.
        events: events of any rows. Rows other than :data:`megatron_wallfacer.engine.timeline.ROWS` follow those.
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
        # Transfers of one channel may overlap, which complete events of one thread may not: they are asynchronous.
        if event.row in ROWS:
            trace.append({"ph": "X", **place, "name": event.name, **times})
            continue
        ends = {"cat": event.row, "id": f"{rank} {event.row} {event.name} {event.start}", "name": event.name}
        trace.append({"ph": "b", "ts": event.start * 1e6, **place, **ends})
        trace.append({"ph": "e", "ts": event.end * 1e6, **place, **ends})
    return trace


def write_trace(events: Sequence[dict[str, object]], path: Path, about: Mapping[str, object] | None = None) -> None:
    """Write events as a JSON file, and create its folder.

    Args:
        events: events of the Chrome trace format.
        path: path of the file.
        about: metadata that viewers show with the trace.
    """
    trace = {"traceEvents": events, "displayTimeUnit": "ms"} | ({"otherData": dict(about)} if about else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(trace))
