"""Align the clocks of the timelines of several nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_wallfacer.engine.timeline import TimelineEvent
from megatron_wallfacer.traces.timelines import RankTimeline


def on_one_clock(timelines: Sequence[RankTimeline]) -> tuple[list[RankTimeline], str]:
    """Shift timelines so that their times are seconds since the first event of any rank.

    Ranks of one node share one monotonic clock, so events of a node are shifted by the same time. Wall clocks give the
    difference between the monotonic clocks of two nodes.

    Returns:
        The shifted timelines, and a sentence on how accurately the clocks of different nodes agree.
    """
    shifts, accuracy = _shifts(timelines)
    aligned = [_shifted(timeline, shift) for timeline, shift in zip(timelines, shifts, strict=True)]
    if nodes := _nodes_without_overlap(aligned):
        accuracy += f"; {', '.join(nodes)} and {_node(aligned[0])} are never busy together: a wall clock is wrong"
    first = min(event.start for timeline in aligned for event in timeline.events)
    return [_shifted(timeline, -first) for timeline in aligned], accuracy


def _shifts(timelines: Sequence[RankTimeline]) -> tuple[list[float], str]:
    """Return the seconds to add to each timeline, and a sentence about the accuracy."""
    if any(timeline.origin is None for timeline in timelines):
        return [0.0] * len(timelines), "treated as one clock: the files do not name their nodes"
    # Use one offset per node. Offsets of a node's ranks differ slightly, because reading two clocks takes time.
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
    """Return nodes whose events never overlap in time with events of the first node, which indicates a wrong clock."""
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
