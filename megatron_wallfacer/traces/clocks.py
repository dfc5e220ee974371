"""Put the timelines of several nodes on one clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_wallfacer.engine.timeline import TimelineEvent
from megatron_wallfacer.traces.timelines import RankTimeline


def on_one_clock(timelines: Sequence[RankTimeline]) -> tuple[list[RankTimeline], str]:
    """Return timelines in seconds since the first event of any rank, and how exact this is.

    Ranks of one node share one monotonic clock, so their events keep their distances. Nodes are aligned by their wall
    clocks.

    Args:
        timelines: one timeline per rank.

    Returns:
        The shifted timelines, and one sentence about the accuracy across nodes.
    """
    shifts, accuracy = _shifts(timelines)
    aligned = [_shifted(timeline, shift) for timeline, shift in zip(timelines, shifts, strict=True)]
    if nodes := _nodes_without_overlap(aligned):
        accuracy += f"; {', '.join(nodes)} and {_node(aligned[0])} are never busy together: a wall clock is wrong"
    first = min(event.start for timeline in aligned for event in timeline.events)
    return [_shifted(timeline, -first) for timeline in aligned], accuracy


def _shifts(timelines: Sequence[RankTimeline]) -> tuple[list[float], str]:
    """Return the seconds to add to each timeline, and the source of these numbers."""
    if any(timeline.origin is None for timeline in timelines):
        return [0.0] * len(timelines), "treated as one clock: the files do not name their nodes"
    # One offset per node: reading two clocks takes time, so the offsets of its ranks differ by that.
    offsets: dict[str, float] = {}
    for timeline in timelines:
        offsets.setdefault(_node(timeline), timeline.origin.wall_s)
    shifts = [offsets[_node(timeline)] - offsets[_node(timelines[0])] for timeline in timelines]
    if len(offsets) == 1:
        return shifts, "one node, one clock"
    return shifts, (
        f"{len(offsets)} nodes, aligned by their wall clocks, which NTP keeps within milliseconds: "
        "smaller differences between nodes mean nothing"
    )


def _nodes_without_overlap(timelines: Sequence[RankTimeline]) -> list[str]:
    """Return nodes that are never busy at the same time as the first node. Ranks of one training step always are."""
    spans: dict[str, tuple[float, float]] = {}
    for timeline in timelines:
        start, end = min(event.start for event in timeline.events), max(event.end for event in timeline.events)
        before = spans.get(_node(timeline), (start, end))
        spans[_node(timeline)] = min(start, before[0]), max(end, before[1])
    start, end = spans[_node(timelines[0])]
    return [node for node, (first, last) in spans.items() if last < start or first > end]


def _node(timeline: RankTimeline) -> str:
    return timeline.origin.host if timeline.origin else ""


def _shifted(timeline: RankTimeline, seconds: float) -> RankTimeline:
    events = (
        TimelineEvent(event.row, event.name, event.start + seconds, event.end + seconds) for event in timeline.events
    )
    return replace(timeline, events=tuple(events))
