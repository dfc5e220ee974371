"""Chrome and Perfetto traces of simulated layers, in the same format as traces of real runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_wallfacer import chrome_trace
from megatron_wallfacer.engine import timeline
from megatron_wallfacer.planning.simulator import Span

#: Rows of a rank's timeline, by kind of span. Transfers overlap, so they have one row per axis instead.
ROWS = {"pass": "pass", "kernel": "compute", "wait": "wait", "copy": "copy"}


def trace_events(spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Return the trace events of one simulated layer, with times in microseconds."""
    by_rank: dict[int, list[timeline.TimelineEvent]] = {}
    for span in spans:
        by_rank.setdefault(span.rank, []).append(_event(span))
    return [event for rank, events in sorted(by_rank.items()) for event in chrome_trace.trace_events(rank, events)]


def _event(span: Span) -> timeline.TimelineEvent:
    if span.kind not in ROWS:
        return timeline.TimelineEvent(f"transfer {span.name.partition(':')[0]}", span.name, span.start_s, span.end_s)
    name = f"{span.kind}: {span.name or 'end of pass'}" if span.kind in ("wait", "copy") else span.name
    return timeline.TimelineEvent(ROWS[span.kind], name, span.start_s, span.end_s)


def write_trace(spans: Iterable[Span], path: Path) -> None:
    """Write the trace of one simulated layer as a JSON file. Missing parent folders are created."""
    chrome_trace.write_trace(trace_events(spans), path)
