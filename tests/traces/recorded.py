"""A recorded run of four ranks."""

from __future__ import annotations

from pathlib import Path

from megatron_wallfacer.chrome_trace import TraceSource, trace_events, write_trace
from megatron_wallfacer.engine.timeline import TimelineEvent
from megatron_wallfacer.traces.timelines import RankTimeline

RANKS, RING, TEAM = 4, "ring_outer inputs", "team results"


def events(rank: int, start: float = 1000.0) -> tuple[TimelineEvent, ...]:
    """Return two forward passes of 1 s and a backward pass of 2 s, 1 s apart; rank r waits r * 0.1 s in each."""
    found: list[TimelineEvent] = []
    for number, (name, seconds) in enumerate((("forward", 1.0), ("forward", 1.0), ("backward", 2.0))):
        begin, wait = start + 2 * number, 0.1 * rank
        end = begin + seconds
        found += [
            TimelineEvent("copy", "Load", begin, begin + 0.1),
            TimelineEvent("compute", "own.q x own.kv", begin + 0.1, end - wait),
            TimelineEvent(RING, "block", begin + 0.05, end),
            TimelineEvent("wait", "block", end - wait, end),
            TimelineEvent("pass", name, begin, end),
        ]
    # Between passes, where other layers run: the event belongs to no pass.
    return (*found, TimelineEvent(TEAM, "part", start + 1.2, start + 1.8))


def rank_timeline(rank: int, host: str = "node", wall_s: float = 0.0, **changes: float) -> RankTimeline:
    return RankTimeline(rank, events(rank, **changes), TraceSource(rank, RANKS, "a run", "cpu", host, wall_s))


def write_run(folder: Path, timelines: list[RankTimeline]) -> Path:
    for one in timelines:
        about = one.origin and one.origin.as_dict()
        write_trace(trace_events(one.rank, one.events), folder / f"rank-{one.rank}.json", about)
    return folder
