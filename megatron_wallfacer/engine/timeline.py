"""An observer that records the timeline of one rank: its passes, computation, waits and transfers in flight."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from megatron_wallfacer.schedule.ops import Attend, Op, Schedule, SendRecv, Transfer
from megatron_wallfacer.schedule.volume import Shape

#: Rows of a rank in which events do not overlap. The rows of the channels of transfers follow.
ROWS = ("pass", "compute", "wait", "copy")
PASSES = ("forward", "backward")


@dataclass(frozen=True, eq=False)
class Pass:
    """One run of a schedule on tensors with the sizes in ``shape``."""

    schedule: Schedule
    shape: Shape

    @property
    def name(self) -> str:
        """Return ``forward`` or ``backward``."""
        return "backward" if self.schedule.backward else "forward"

    def __str__(self) -> str:
        return f"{self.name} pass"


Observer = Callable[[Pass | Op | Transfer], AbstractContextManager[None]]
"""A function from a pass, a running operation or a wait for a transfer to a context, in which the label runs."""


def no_observer(_: Pass | Op | Transfer) -> AbstractContextManager[None]:
    """Return an empty context. This observer records nothing."""
    return nullcontext()


def observes(observer: Observer) -> bool:
    """Return whether an observer records passes now. An observer is paused if its attribute ``observing`` is False."""
    return observer is not no_observer and getattr(observer, "observing", True)


def combined(observers: Sequence[Observer]) -> Observer:
    """Return one observer that enters the contexts of all observers; :func:`no_observer` if there are none."""
    if len(observers) < 2:
        return observers[0] if observers else no_observer

    @contextmanager
    def observe(label: Pass | Op | Transfer) -> Iterator[None]:
        with ExitStack() as contexts:
            for observer in observers:
                contexts.enter_context(observer(label))
            yield

    return observe


@dataclass(frozen=True)
class TimelineEvent:
    """One interval of a timeline.

    Attributes:
        row: ``pass``, ``compute``, ``wait``, ``copy``, or the channel of a transfer.
        name: text that a trace viewer shows; ``forward`` or ``backward`` for a pass.
        start: time of the monotonic clock at the beginning, in seconds.
        end: time of the monotonic clock at the end, in seconds. For a transfer this is the end of the wait. The data
            may have arrived earlier.
    """

    row: str
    name: str
    start: float
    end: float


class Timeline:
    """An :data:`Observer` that records the passes of one rank as ``events``, sorted by their end times."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.events: list[TimelineEvent] = []
        self._begun: dict[int, float] = {}

    @contextmanager
    def __call__(self, label: Pass | Op | Transfer) -> Iterator[None]:
        """Record the time of a pass, an operation, or a wait."""
        start = time.monotonic()
        if isinstance(label, SendRecv):
            self._begun[id(label.transfer)] = start
        yield
        end = time.monotonic()
        if isinstance(label, Transfer):
            name = ", ".join(message.value for message in label.receives)
            self.events.append(TimelineEvent("wait", name, start, end))
            self.events.append(TimelineEvent(" ".join(label.channel), name, self._begun.pop(id(label)), end))
        elif isinstance(label, Pass):
            self.events.append(TimelineEvent("pass", label.name, start, end))
        elif isinstance(label, Attend):
            self.events.append(TimelineEvent("compute", f"{'+'.join(label.q)} x {'+'.join(label.kv)}", start, end))
        else:
            self.events.append(TimelineEvent("copy", type(label).__name__, start, end))


@dataclass(frozen=True)
class Total:
    """Total times of selected passes of one rank.

    Attributes:
        passes: number of passes.
        attention_s: total duration of the passes, in seconds.
        computing_s: part of ``attention_s`` that kernels take, in seconds.
        exposed_s: part of ``attention_s`` in which the rank waited for a transfer and computed nothing, in seconds.
    """

    passes: int
    attention_s: float
    computing_s: float
    exposed_s: float

    @property
    def exposed_share(self) -> float:
        """Return the exposed share of the attention time, ``exposed_s / attention_s``."""
        return self.exposed_s / self.attention_s if self.attention_s else 0.0


def by_pass(events: Sequence[TimelineEvent]) -> list[tuple[TimelineEvent, list[TimelineEvent]]]:
    """Return (pass, events that began in the pass) for each pass, sorted by the start of the pass.

    Events outside all passes are omitted. The passes of a rank must not overlap.
    """
    passes = sorted((event for event in events if event.row == "pass"), key=lambda event: event.start)
    starts = [event.start for event in passes]
    found: list[tuple[TimelineEvent, list[TimelineEvent]]] = [(event, []) for event in passes]
    for event in events:
        index = bisect_right(starts, event.start) - 1
        if event.row != "pass" and index >= 0 and event.start <= passes[index].end:
            found[index][1].append(event)
    return found


def total(events: Sequence[TimelineEvent], name: str | None = None) -> Total:
    """Return the total times of the passes called ``name``, or of all passes if ``name`` is None."""
    chosen = [(one, inside) for one, inside in by_pass(events) if name in (None, one.name)]

    def seconds(row: str) -> float:
        return sum(event.end - event.start for _, inside in chosen for event in inside if event.row == row)

    return Total(len(chosen), sum(one.end - one.start for one, _ in chosen), seconds("compute"), seconds("wait"))


def is_transfer(event: TimelineEvent) -> bool:
    """Return whether an event is a transfer, which may overlap other events."""
    return event.row not in ROWS
