"""A played layer as a trace that Chrome and Perfetto open, in the form of the engine's time lines."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_wallfacer.engine import timeline
from megatron_wallfacer.planning.play import Span

#: Rows of a rank by what it did; moves overlap each other and follow, one row for each axis.
ROWS = {"pass": "pass", "kernel": "compute", "wait": "wait", "copy": "copy"}


def trace_events(spans: Iterable[Span]) -> list[dict[str, Any]]:
    """The events of a trace, times in microseconds.

    Args:
        spans: of one layer.
    """
    by_rank: dict[int, list[timeline.Event]] = {}
    for span in spans:
        by_rank.setdefault(span.rank, []).append(_event(span))
    return [
        event
        for rank, events in sorted(by_rank.items())
        for event in timeline.trace_events(rank, events, timeline.ROWS)
    ]


def _event(span: Span) -> timeline.Event:
    if span.what not in ROWS:
        return timeline.Event(f"move {span.name.partition(':')[0]}", span.name, span.start_s, span.end_s)
    name = f"{span.what}: {span.name or 'end of pass'}" if span.what in ("wait", "copy") else span.name
    return timeline.Event(ROWS[span.what], name, span.start_s, span.end_s)


def write_trace(spans: Iterable[Span], path: Path) -> None:
    """Write the trace; makes the folder.

    Args:
        spans: of one layer.
        path: of the JSON file.
    """
    timeline.write_trace(trace_events(spans), path)
