"""A played layer as a trace that Chrome and Perfetto open: a process for each rank, a row for each kind of thing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_wallfacer.planning.play import Span

#: Rows of a rank; moves overlap each other and follow, one row for each axis.
ROWS = ("kernel", "copy", "wait")


def trace_events(spans: Iterable[Span]) -> list[dict[str, Any]]:
    """The events of a trace, times in microseconds.

    Args:
        spans: of one layer.
    """
    events: list[dict[str, Any]] = []
    rows: dict[tuple[int, str], int] = {}
    for span in spans:
        row = span.what if span.what in ROWS else f"move {span.name.partition(':')[0]}"
        number = rows.setdefault((span.rank, row), len(rows))
        if span.what in ROWS:
            times = {"ts": span.start_s * 1e6, "dur": (span.end_s - span.start_s) * 1e6}
            name = span.name if span.what == "kernel" else f"{span.what}: {span.name or 'end of pass'}"
            events.append({"ph": "X", "pid": span.rank, "tid": number, "name": name, **times})
            continue
        # Moves of an axis may be on their way at once: begin and end, told apart by an id.
        place = {"cat": row, "id": len(events), "pid": span.rank, "tid": number, "name": span.name}
        events.append({"ph": "b", "ts": span.start_s * 1e6, **place})
        events.append({"ph": "e", "ts": span.end_s * 1e6, **place})
    named = [
        {"ph": "M", "pid": rank, "tid": number, "name": "thread_name", "args": {"name": row}}
        for (rank, row), number in rows.items()
    ]
    ranks = sorted({rank for rank, _ in rows})
    named += [{"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}} for rank in ranks]
    return named + events


def write_trace(spans: Iterable[Span], path: Path) -> None:
    """Write the trace; makes the folder.

    Args:
        spans: of one layer.
        path: of the JSON file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": trace_events(spans), "displayTimeUnit": "ms"}))
