"""Amounts that flow over shared resources at max-min fair rates, which TCP and a scheduler of processors come near.

Nobody is given more where that would leave somebody with less who already has less than they. Flows that use the same
resources have the same rate, so they are kept together: what one has been served since it began, all have.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

Uses = tuple[tuple[Hashable, float], ...]
"""Resources, and how much of their capacity a unit of rate takes."""

#: Levels this close are the same, but for rounding.
_SAME = 1 + 1e-9


@dataclass
class Group:
    """Flows with the same resources.

    Attributes:
        uses: of each flow.
        limit: highest rate of each; None for no limit of its own.
        rate: of each, as last shared out.
        served: what each has been served so far, or would have been if it had always been there.
        ends: by when in ``served`` each flow is through, and what is to be done then; a heap.
    """

    uses: Uses
    limit: float | None
    rate: float = 0.0
    served: float = 0.0
    ends: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)


class Fluid:
    """Flows and resources.

    Args:
        capacity: by resource; one that is not named limits nothing.
    """

    def __init__(self, capacity: Mapping[Hashable, float]) -> None:
        self.capacity = dict(capacity)
        self._groups: dict[tuple[Uses, float | None], Group] = {}
        self._number, self._stale = 0, False

    def add(self, amount: float, uses: Uses, then: Callable[[], None], limit: float | None = None) -> None:
        """From now on; ``then`` is called by whoever lets the time pass in which it ends."""
        group = self._groups.setdefault((uses, limit), Group(uses, limit))
        self._number += 1
        heapq.heappush(group.ends, (group.served + amount, self._number, then))
        self._stale = True

    def used(self, key: Hashable) -> float:
        """Part of a resource's capacity that flows take now."""
        self._share()
        taken = sum(group.rate * weight * len(group.ends) for group, weight in self._users(key))
        return min(1.0, taken / self.capacity[key])

    def _users(self, key: Hashable) -> Iterable[tuple[Group, float]]:
        return ((group, weight) for group in self._groups.values() for name, weight in group.uses if name == key)

    def _share(self) -> None:
        if self._stale:
            share(self._groups.values(), self.capacity)
            self._stale = False

    def next_end_s(self) -> float | None:
        """Seconds until the first flow is through, if none is added before."""
        self._share()
        ends = ((group.ends[0][0] - group.served) / group.rate for group in self._groups.values())
        return min(ends, default=None)

    def pass_time(self, seconds: float) -> list[Callable[[], None]]:
        """Let time pass, not beyond the next end; what is to be done for the flows that are through by then."""
        done: list[Callable[[], None]] = []
        for key, group in list(self._groups.items()):
            group.served = group.ends[0][0] if group.rate == float("inf") else group.served + group.rate * seconds
            while group.ends and group.ends[0][0] <= group.served * _SAME:
                done.append(heapq.heappop(group.ends)[2])
                self._stale = True
            if not group.ends:
                del self._groups[key]
        return done


def share(groups: Iterable[Group], capacity: Mapping[Hashable, float]) -> None:
    """Give every flow its max-min fair rate: all rise together until something is full, and so on with the others."""
    rising = list(groups)
    left = dict(capacity)
    while rising:
        load: dict[Hashable, float] = {}
        for group in rising:
            for key, weight in group.uses:
                if key in left:
                    load[key] = load.get(key, 0.0) + weight * len(group.ends)
        levels = {key: max(left[key], 0.0) / weight for key, weight in load.items() if weight > 0}
        limits = [group.limit for group in rising if group.limit is not None]
        level = min([*levels.values(), *limits], default=float("inf"))
        full = {key for key, value in levels.items() if value <= level * _SAME}
        still_rising = []
        for group in rising:
            stopped = group.limit is not None and group.limit <= level * _SAME
            if stopped or level == float("inf") or any(key in full for key, _ in group.uses):
                group.rate = level
                for key, weight in group.uses:
                    if key in left:
                        left[key] -= level * weight * len(group.ends)
            else:
                still_rising.append(group)
        rising = still_rising
