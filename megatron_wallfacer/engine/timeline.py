"""The time line of a pass on one rank: what it computed, what it waited for, what was on its way meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from megatron_wallfacer.schedule.ops import Attend, Move, Op, Schedule, Start
from megatron_wallfacer.schedule.volume import Shape

#: Rows of a rank in which nothing overlaps; a row for each channel of moves follows.
ROWS = ("pass", "compute", "wait", "copy")


@dataclass(frozen=True, eq=False)
class Pass:
    """One run of a schedule.

    Attributes:
        schedule: this rank's.
        shape: of the rank's shard.
    """

    schedule: Schedule
    shape: Shape

    @property
    def name(self) -> str:
        """``forward`` or ``backward``."""
        return "backward" if self.schedule.backward else "forward"

    def __str__(self) -> str:
        return f"{self.name} pass"


Recorder = Callable[[Pass | Op | Move], AbstractContextManager[None]]
"""Told of each pass and of each operation in it while it runs, and of each move while it is waited for."""


def nothing(_: Pass | Op | Move) -> AbstractContextManager[None]:
    """The recorder that records nothing."""
    return nullcontext()


def observes(recorder: Recorder) -> bool:
    """Return whether a recorder records passes at present; one without an attribute ``observing`` always does."""
    return recorder is not nothing and getattr(recorder, "observing", True)


def together(recorders: Sequence[Recorder]) -> Recorder:
    """One recorder that tells several; :func:`nothing` where there are none."""
    if len(recorders) < 2:
        return recorders[0] if recorders else nothing

    @contextmanager
    def record(what: Pass | Op | Move) -> Iterator[None]:
        with ExitStack() as all_of_them:
            for recorder in recorders:
                all_of_them.enter_context(recorder(what))
            yield

    return record


@dataclass(frozen=True)
class Event:
    """Something that took a while.

    Attributes:
        row: ``pass``, ``compute``, ``wait``, ``copy``, or the channel of a move.
        name: what it was; of a pass ``forward`` or ``backward``.
        start, end: seconds of the monotonic clock; of a move, from its start until it was no longer waited for, so
            its end may be later than its arrival.
    """

    row: str
    name: str
    start: float
    end: float


class Timeline:
    """Records the passes of one rank. It is a :data:`Recorder`.

    Attributes:
        rank: for the picture.
        events: so far, by their end.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.events: list[Event] = []
        self._begun: dict[int, float] = {}

    @contextmanager
    def __call__(self, what: Pass | Op | Move) -> Iterator[None]:
        start = time.monotonic()
        if isinstance(what, Start):
            self._begun[id(what.move)] = start
        yield
        end = time.monotonic()
        if isinstance(what, Move):
            name = ", ".join(message.value for message in what.receives)
            self.events.append(Event("wait", name, start, end))
            self.events.append(Event(" ".join(what.channel), name, self._begun.pop(id(what)), end))
        elif isinstance(what, Pass):
            self.events.append(Event("pass", what.name, start, end))
        elif isinstance(what, Attend):
            self.events.append(Event("compute", f"{'+'.join(what.q)} x {'+'.join(what.kv)}", start, end))
        else:
            self.events.append(Event("copy", type(what).__name__, start, end))

    def seconds(self, row: str) -> float:
        """Total of a row."""
        return sum(event.end - event.start for event in self.events if event.row == row)

    @property
    def span_s(self) -> float:
        """From the first event to the last."""
        if not self.events:
            return 0.0
        return max(event.end for event in self.events) - min(event.start for event in self.events)

    @property
    def exposed_share(self) -> float:
        """Share of the time in which the rank waited for a move and computed nothing."""
        return self.seconds("wait") / self.span_s if self.events else 0.0

    def trace(self) -> list[dict[str, object]]:
        """Events of the Chrome trace format; see :func:`trace_events`."""
        return trace_events(self.rank, self.events, ROWS)

    def write(self, path: Path, about: Mapping[str, object] | None = None) -> None:
        """As a Chrome/Perfetto JSON file; see :func:`write_trace`."""
        write_trace(self.trace(), path, about)


def trace_events(rank: int, events: Iterable[Event], rows: Sequence[str]) -> list[dict[str, object]]:
    """Events of the Chrome trace format, which Perfetto reads: a process for the rank, a thread for each row.

    Args:
        rank: whose.
        events: of any rows.
        rows: those in which nothing overlaps, in their order; others follow.
    """
    events = list(events)
    every = [*rows, *sorted({event.row for event in events} - set(rows))]
    named = [("process_name", 0, f"rank {rank}"), *(("thread_name", i, row) for i, row in enumerate(every))]
    found: list[dict[str, object]] = [
        {"ph": "M", "pid": rank, "tid": row, "name": kind, "args": {"name": name}} for kind, row, name in named
    ]
    for event in events:
        times = {"ts": event.start * 1e6, "dur": (event.end - event.start) * 1e6}
        place = {"pid": rank, "tid": every.index(event.row)}
        # Moves of one channel may overlap, which complete events of one thread may not: theirs are asynchronous.
        if event.row in rows:
            found.append({"ph": "X", **place, "name": event.name, **times})
            continue
        ends = {"cat": event.row, "id": f"{rank} {event.row} {event.name} {event.start}", "name": event.name}
        found.append({"ph": "b", "ts": event.start * 1e6, **place, **ends})
        found.append({"ph": "e", "ts": event.end * 1e6, **place, **ends})
    return found


def write_trace(events: Sequence[dict[str, object]], path: Path, about: Mapping[str, object] | None = None) -> None:
    """Write events as a Chrome/Perfetto JSON file; makes the folder.

    Args:
        events: of the Chrome trace format.
        path: of the file.
        about: what else is to be known of them; viewers show it as the trace's metadata.
    """
    trace = {"traceEvents": events, "displayTimeUnit": "ms"} | ({"otherData": dict(about)} if about else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(trace))
