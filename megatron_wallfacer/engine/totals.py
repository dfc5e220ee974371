"""What the passes of a time line took."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_wallfacer.engine.timeline import ROWS, Event

PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Total:
    """Of some passes of one rank, in seconds.

    Attributes:
        passes: how many.
        attention_s: from the beginning of each to its end.
        computing_s: of it, in kernels.
        exposed_s: of it, waiting for a move while nothing was computed.
        exposed_share: of the attention.
    """

    passes: int
    attention_s: float
    computing_s: float
    exposed_s: float

    @property
    def exposed_share(self) -> float:
        """Share of the time in which the rank waited and computed nothing."""
        return self.exposed_s / self.attention_s if self.attention_s else 0.0


def by_pass(events: Sequence[Event]) -> list[tuple[Event, list[Event]]]:
    """Each pass with what began in it, moves too, in the order in which the passes began.

    What lies outside of every pass is left out. Passes of a rank do not overlap.
    """
    passes = sorted((event for event in events if event.row == "pass"), key=lambda event: event.start)
    starts = [event.start for event in passes]
    found: list[tuple[Event, list[Event]]] = [(event, []) for event in passes]
    for event in events:
        index = bisect_right(starts, event.start) - 1
        if event.row != "pass" and index >= 0 and event.start <= passes[index].end:
            found[index][1].append(event)
    return found


def total(events: Sequence[Event], name: str | None = None) -> Total:
    """Of the passes of one name; of all unless given."""
    chosen = [(one, inside) for one, inside in by_pass(events) if name in (None, one.name)]

    def seconds(row: str) -> float:
        return sum(event.end - event.start for _, inside in chosen for event in inside if event.row == row)

    return Total(len(chosen), sum(one.end - one.start for one, _ in chosen), seconds("compute"), seconds("wait"))


def is_move(event: Event) -> bool:
    """Whether it was on its way, rather than done by the rank."""
    return event.row not in ROWS
