"""Read the timelines of a run from the files of its ranks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from megatron_wallfacer.chrome_trace import MOST_RANKS, TraceSource
from megatron_wallfacer.engine.timeline import TimelineEvent
from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.input_files import read_json
from megatron_wallfacer.lists import numbers_listed
from megatron_wallfacer.traces.json_items import item_line

_EVENTS = "traceEvents"
_NAME = re.compile(r"rank-(\d+)\.json")
#: Largest number of ranks in one message.
_LISTED = 8
#: Largest valid time in a file, 1e15 microseconds (thirty years).
_LARGEST_US = 1e15


@dataclass(frozen=True)
class RankTimeline:
    """Timeline of one rank, with times in seconds.

    ``origin`` states run, node and clock of the recording. ``origin`` is None if the file does not state
    run, node and clock.
    """

    rank: int
    events: tuple[TimelineEvent, ...]
    origin: TraceSource | None = None


def parse_ranks(text: str) -> frozenset[int]:
    """Return the ranks of a list such as ``0-3,8``.

    Raises:
        OptionError: The text is not a list of ranks.
    """
    ranks = numbers_listed(text)
    if ranks is None:
        raise OptionError("ranks", text, "ranks such as 0-7 or 0,2,4-6")
    return ranks


def read_timelines(path: Path, ranks: Collection[int] | None = None) -> list[RankTimeline]:
    """Return timelines by rank, from a folder with files ``rank-R.json`` or from one file of several ranks.

    Raises:
        WallfacerError: A timeline is missing or cannot be read, or timelines belong to different runs.
    """
    if path.is_dir():
        timelines = _read_folder(path, ranks)
    elif path.is_file():
        timelines = _read_file(path, ranks)
    else:
        raise WallfacerError(f"{path}: must be an existing folder or file")
    if not timelines:
        raise WallfacerError(f"{_location(path, _EVENTS)}: contains no event")
    for timeline in timelines:
        if not any(event.row == "pass" for event in timeline.events):
            location = _location(path / f"rank-{timeline.rank}.json" if path.is_dir() else path, _EVENTS)
            raise WallfacerError(f"{location}: contains no attention pass of rank {timeline.rank}")
    return timelines


def _read_folder(folder: Path, ranks: Collection[int] | None) -> list[RankTimeline]:
    files = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    if not files:
        raise WallfacerError(
            f"{folder}: contains no rank-R.json; training writes these files with --wallfacer-timeline DIR"
        )
    if max(files) >= MOST_RANKS:
        raise WallfacerError(f"{folder}: rank-{max(files)}.json: must name a rank below {MOST_RANKS}")
    if ranks is not None:
        _check_complete(folder, files, ranks)
    timelines = [_read_rank(path, rank) for rank, path in sorted(files.items()) if ranks is None or rank in ranks]
    _check_one_run(folder, timelines)
    if ranks is None:
        origin = timelines[0].origin
        _check_complete(folder, files, range(origin.ranks if origin else max(files) + 1))
    return timelines


def _read_rank(path: Path, rank: int) -> RankTimeline:
    trace = _load(path)
    by_rank = _events(trace, path)
    if set(by_rank) != {rank}:
        raise WallfacerError(
            f"{_location(path, _EVENTS, 0)}: must contain rank {rank} only, contains {_ranks(by_rank) or 'no rank'}"
        )
    about = trace.get("otherData")
    try:
        origin = None if about is None else TraceSource.read(about)
    except (KeyError, ValueError, TypeError) as error:
        location = _location(path, "otherData")
        raise WallfacerError(f"{location}: the fields run, node and clock cannot be read: {error!r}") from error
    return RankTimeline(rank, tuple(by_rank[rank]), origin)


def _read_file(path: Path, ranks: Collection[int] | None) -> list[RankTimeline]:
    by_rank = _events(_load(path), path)
    if ranks is not None:
        _check_complete(path, by_rank, ranks)
    return [RankTimeline(rank, tuple(by_rank[rank])) for rank in sorted(by_rank) if ranks is None or rank in ranks]


def _check_complete(path: Path, present: Iterable[int], expected: Iterable[int]) -> None:
    missing = sorted(set(expected) - set(present))
    if missing:
        raise WallfacerError(
            f"{path}: {_ranks(missing)} missing; copy the files of the other nodes into this folder, or list with "
            f"--ranks only ranks that are present: {_ranks(present)}"
        )


def _check_one_run(folder: Path, timelines: Sequence[RankTimeline]) -> None:
    first = timelines[0]
    for timeline in timelines[1:]:
        runs = [recorded.origin and recorded.origin.run for recorded in (first, timeline)]
        if runs[0] != runs[1]:
            raise WallfacerError(
                f"{folder}: rank-{timeline.rank}.json and rank-{first.rank}.json belong to two runs; "
                "remove the older file"
            )


def _ranks(ranks: Iterable[int]) -> str:
    """Return a text such as ``rank 3`` or ``ranks 0, 1, 2``. Dots shorten a long list."""
    listed = sorted(ranks)
    text = ", ".join(map(str, listed[:_LISTED])) + (f", ... {listed[-1]}" if len(listed) > _LISTED else "")
    return f"rank{'' if len(listed) == 1 else 's'} {text}"


def _load(path: Path) -> dict[str, Any]:
    trace = read_json(path)
    if not isinstance(trace, dict) or not isinstance(trace.get(_EVENTS), list):
        raise WallfacerError(f"{_location(path, _EVENTS)}: must be a trace with a list {_EVENTS}")
    return trace


def _events(trace: Mapping[str, Any], path: Path) -> dict[int, list[TimelineEvent]]:
    """Return the events of each rank, as written by :func:`megatron_wallfacer.chrome_trace.trace_events`."""
    numbers = count()
    try:
        return _parsed(event for event, _ in zip(trace[_EVENTS], numbers, strict=False))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        location = _location(path, _EVENTS, next(numbers) - 1)
        raise WallfacerError(f"{location}: is not an event of --wallfacer-timeline: {error!r}") from error


def _location(path: Path, name: str, index: int | None = None) -> str:
    return f"{path}:{item_line(path, name, index)}"


def _parsed(events: Iterable[Mapping[str, Any]]) -> dict[int, list[TimelineEvent]]:
    rows: dict[tuple[int, int], str] = {}
    begun: dict[tuple[int, str], Mapping[str, Any]] = {}
    by_rank: dict[int, list[TimelineEvent]] = {}
    for event in events:
        rank, kind = int(event["pid"]), event["ph"]
        by_rank.setdefault(rank, [])
        if kind == "M" and event["name"] == "thread_name":
            rows[rank, event["tid"]] = _text(event["args"]["name"])
        elif kind == "X":
            start = _seconds(event["ts"])
            row, name = rows[rank, event["tid"]], _text(event["name"])
            by_rank[rank].append(TimelineEvent(row, name, start, start + _seconds(event["dur"])))
        elif kind == "b":
            begun[rank, event["id"]] = event
        elif kind == "e":
            first = begun.pop((rank, event["id"]))
            row, name = _text(first["cat"]), _text(first["name"])
            by_rank[rank].append(TimelineEvent(row, name, _seconds(first["ts"]), _seconds(event["ts"])))
    return by_rank


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} must be a text")
    return value


def _seconds(microseconds: object) -> float:
    if not isinstance(microseconds, int | float) or not abs(microseconds) <= _LARGEST_US:
        raise TypeError(f"{microseconds!r:.40} must be a number of microseconds")
    return microseconds * 1e-6
