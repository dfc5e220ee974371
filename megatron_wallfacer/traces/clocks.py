"""Time lines of several hosts on one clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_wallfacer.engine.timeline import Event
from megatron_wallfacer.traces.timelines import RankLine


def on_one_clock(lines: Sequence[RankLine]) -> tuple[list[RankLine], str]:
    """Events in seconds since the first of all, and a sentence about how far to trust that across hosts.

    Ranks of one host have one monotonic clock and are not moved against each other. Hosts are put where their wall
    clocks say.
    """
    shifts, told = _shifts(lines)
    moved = [_moved(line, shift) for line, shift in zip(lines, shifts, strict=True)]
    if strangers := _strangers(moved):
        told += f"; even so {', '.join(strangers)} did nothing while {_host(moved[0])} did: its wall clock is wrong"
    first = min(event.start for line in moved for event in line.events)
    return [_moved(line, -first) for line in moved], told


def _shifts(lines: Sequence[RankLine]) -> tuple[list[float], str]:
    """Seconds by which each line is late, and what that is known from."""
    if any(line.origin is None for line in lines):
        return [0.0] * len(lines), "taken as one clock: the time lines do not say which host they are from"
    # One offset a host: those of its ranks differ by how long reading two clocks takes.
    offsets: dict[str, float] = {}
    for line in lines:
        offsets.setdefault(_host(line), line.origin.wall_s)
    shifts = [offsets[_host(line)] - offsets[_host(lines[0])] for line in lines]
    if len(offsets) == 1:
        return shifts, "one host, one clock"
    return shifts, (
        f"{len(offsets)} hosts, put together by their wall clocks, which NTP keeps within milliseconds: "
        "compare ranks of different hosts no closer"
    )


def _strangers(lines: Sequence[RankLine]) -> list[str]:
    """Hosts that were never busy at the same time as the first: ranks of a step are."""
    spans: dict[str, tuple[float, float]] = {}
    for line in lines:
        start, end = min(event.start for event in line.events), max(event.end for event in line.events)
        before = spans.get(_host(line), (start, end))
        spans[_host(line)] = min(start, before[0]), max(end, before[1])
    start, end = spans[_host(lines[0])]
    return [host for host, (first, last) in spans.items() if last < start or first > end]


def _host(line: RankLine) -> str:
    return line.origin.host if line.origin else ""


def _moved(line: RankLine, seconds: float) -> RankLine:
    events = (Event(event.row, event.name, event.start + seconds, event.end + seconds) for event in line.events)
    return replace(line, events=tuple(events))
