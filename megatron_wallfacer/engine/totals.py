"""Total times of the passes in a timeline."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_wallfacer.engine.timeline import ROWS, TimelineEvent

PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Total:
    """Total times of some passes of one rank.

    Attributes:
        passes: number of passes.
        attention_s: seconds from the beginning to the end of each pass.
        computing_s: part of these seconds in kernels.
        exposed_s: part of these seconds in which the rank waited for a transfer and computed nothing.
    """

    passes: int
    attention_s: float
    computing_s: float
    exposed_s: float

    @property
    def exposed_share(self) -> float:
        """Exposed seconds divided by the seconds of attention."""
        return self.exposed_s / self.attention_s if self.attention_s else 0.0


def by_pass(events: Sequence[TimelineEvent]) -> list[tuple[TimelineEvent, list[TimelineEvent]]]:
    """Return each pass and the events that began in it, in the order in which the passes began.

    Events outside of all passes are left out. Passes of a rank do not overlap.
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
    """Return the total times of the passes with a name; of all passes unless given."""
    chosen = [(one, inside) for one, inside in by_pass(events) if name in (None, one.name)]

    def seconds(row: str) -> float:
        return sum(event.end - event.start for _, inside in chosen for event in inside if event.row == row)

    return Total(len(chosen), sum(one.end - one.start for one, _ in chosen), seconds("compute"), seconds("wait"))


def is_transfer(event: TimelineEvent) -> bool:
    """Return whether an event is a transfer, which may overlap other events."""
    return event.row not in ROWS
