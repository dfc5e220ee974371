"""Time lines of a run, read back from the files that it wrote."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from megatron_wallfacer.engine.origin import MOST_RANKS, Origin
from megatron_wallfacer.engine.timeline import Event
from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.input_files import read_json
from megatron_wallfacer.lists import numbers_listed
from megatron_wallfacer.traces.json_items import item_line

_EVENTS = "traceEvents"
_NAME = re.compile(r"rank-(\d+)\.json")
_SHOWN = 8  # ranks that a message names
#: Thirty years: beyond it a picture has no end.
_LARGEST_US = 1e15


@dataclass(frozen=True)
class RankLine:
    """What one rank did.

    Attributes:
        rank: of the job.
        events: of all rows, in seconds.
        origin: where it was recorded; None where the file does not say.
    """

    rank: int
    events: tuple[Event, ...]
    origin: Origin | None = None


def ranks_named(text: str) -> frozenset[int]:
    """``0-3,8`` as a set.

    Raises:
        OptionError: it is not written so.
    """
    found = numbers_listed(text)
    if found is None:
        raise OptionError("ranks", text, "ranks such as 0-7 or 0,2,4-6")
    return found


def read_lines(path: Path, ranks: Collection[int] | None = None) -> list[RankLine]:
    """Time lines, in the order of the ranks.

    Args:
        path: a folder of ``rank-R.json``, or a trace of several ranks in one file.
        ranks: which; all unless given.

    Raises:
        WallfacerError: one of them is missing, cannot be read, or is of another run than the others.
    """
    if path.is_dir():
        lines = _of_folder(path, ranks)
    elif path.is_file():
        lines = _of_file(path, ranks)
    else:
        raise WallfacerError(f"{path}: there is no such folder, nor such a file")
    if not lines:
        raise WallfacerError(f"{_place(path, _EVENTS)}: no event in it")
    for line in lines:
        if not any(event.row == "pass" for event in line.events):
            place = _place(path / f"rank-{line.rank}.json" if path.is_dir() else path, _EVENTS)
            raise WallfacerError(f"{place}: no pass of attention in the time line of rank {line.rank}")
    return lines


def _of_folder(folder: Path, ranks: Collection[int] | None) -> list[RankLine]:
    files = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    if not files:
        raise WallfacerError(f"{folder}: no rank-R.json in it; training writes them with --wallfacer-timeline DIR")
    if max(files) >= MOST_RANKS:
        raise WallfacerError(f"{folder}: rank-{max(files)}.json: must be of a rank below {MOST_RANKS}")
    if ranks is not None:
        _check_complete(folder, files, ranks)
    lines = [_of_rank(path, rank) for rank, path in sorted(files.items()) if ranks is None or rank in ranks]
    _check_one_run(folder, lines)
    if ranks is None:
        origin = lines[0].origin
        _check_complete(folder, files, range(origin.ranks if origin else max(files) + 1))
    return lines


def _of_rank(path: Path, rank: int) -> RankLine:
    trace = _load(path)
    by_rank = _events(trace, path)
    if set(by_rank) != {rank}:
        raise WallfacerError(
            f"{_place(path, _EVENTS, 0)}: is the time line of {_ranks(by_rank) or 'no rank'}, not of rank {rank}"
        )
    about = trace.get("otherData")
    try:
        origin = None if about is None else Origin.read(about)
    except (KeyError, ValueError, TypeError) as error:
        place = _place(path, "otherData")
        raise WallfacerError(f"{place}: what it says of its origin cannot be read: {error!r}") from error
    return RankLine(rank, tuple(by_rank[rank]), origin)


def _of_file(path: Path, ranks: Collection[int] | None) -> list[RankLine]:
    by_rank = _events(_load(path), path)
    if ranks is not None:
        _check_complete(path, by_rank, ranks)
    return [RankLine(rank, tuple(by_rank[rank])) for rank in sorted(by_rank) if ranks is None or rank in ranks]


def _check_complete(path: Path, found: Iterable[int], wanted: Iterable[int]) -> None:
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise WallfacerError(
            f"{path}: {_ranks(missing)} missing; copy what other hosts wrote here, or name with --ranks those that are "
            f"there: {_ranks(found)}"
        )


def _check_one_run(folder: Path, lines: Sequence[RankLine]) -> None:
    first = lines[0]
    for line in lines[1:]:
        runs = [one.origin and one.origin.run for one in (first, line)]
        if runs[0] != runs[1]:
            raise WallfacerError(
                f"{folder}: rank-{line.rank}.json is of another run than rank-{first.rank}.json; remove the older one"
            )


def _ranks(ranks: Iterable[int]) -> str:
    """``rank 3``; ``ranks 0, 1, 2``; with dots where there are many."""
    named = sorted(ranks)
    text = ", ".join(map(str, named[:_SHOWN])) + (f", ... {named[-1]}" if len(named) > _SHOWN else "")
    return f"rank{'' if len(named) == 1 else 's'} {text}"


def _load(path: Path) -> dict[str, Any]:
    trace = read_json(path)
    if not isinstance(trace, dict) or not isinstance(trace.get(_EVENTS), list):
        raise WallfacerError(f"{_place(path, _EVENTS)}: is not a trace: it has no list {_EVENTS}")
    return trace


def _events(trace: Mapping[str, Any], path: Path) -> dict[int, list[Event]]:
    """Events by rank, as :func:`megatron_wallfacer.engine.timeline.trace_events` wrote them."""
    numbers = count()
    try:
        return _parsed(event for event, _ in zip(trace[_EVENTS], numbers, strict=False))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        place = _place(path, _EVENTS, next(numbers) - 1)
        raise WallfacerError(f"{place}: is not a time line of this program: {error!r}") from error


def _place(path: Path, name: str, index: int | None = None) -> str:
    """File and line of an item of the trace."""
    return f"{path}:{item_line(path, name, index)}"


def _parsed(events: Iterable[Mapping[str, Any]]) -> dict[int, list[Event]]:
    rows: dict[tuple[int, int], str] = {}
    begun: dict[tuple[int, str], Mapping[str, Any]] = {}
    found: dict[int, list[Event]] = {}
    for event in events:
        rank, kind = int(event["pid"]), event["ph"]
        found.setdefault(rank, [])
        if kind == "M" and event["name"] == "thread_name":
            rows[rank, event["tid"]] = _text(event["args"]["name"])
        elif kind == "X":
            start = _seconds(event["ts"])
            row, name = rows[rank, event["tid"]], _text(event["name"])
            found[rank].append(Event(row, name, start, start + _seconds(event["dur"])))
        elif kind == "b":
            begun[rank, event["id"]] = event
        elif kind == "e":
            first = begun.pop((rank, event["id"]))
            row, name = _text(first["cat"]), _text(first["name"])
            found[rank].append(Event(row, name, _seconds(first["ts"]), _seconds(event["ts"])))
    return found


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no name")
    return value


def _seconds(microseconds: object) -> float:
    if not isinstance(microseconds, int | float) or not abs(microseconds) <= _LARGEST_US:
        raise TypeError(f"{microseconds!r:.40} is no time")
    return microseconds * 1e-6
