"""A fluid model of shared resources, in which flows progress at max-min fair rates.

TCP and fair process schedulers also approximate max-min fair rates. In a max-min fair allocation no rate can grow
without lowering a rate that is already smaller. Flows with the same resources have the same rate, so they form one
group with one progress counter.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

Uses = tuple[tuple[Hashable, float], ...]
"""(resource, capacity that one unit of rate uses) for each resource of a flow."""

#: Ratio up to which two rates count as equal, because of rounding.
_EQUAL = 1 + 1e-9


@dataclass
class FlowGroup:
    """Flows with the same resources and the same rate limit.

    Attributes:
        uses: pairs (resource, factor). A flow occupies factor x rate of the resource's capacity.
        limit: highest rate of each flow; None if only resources limit the rate.
        rate: current rate of each flow.
        served: integral of ``rate`` over the time since the creation of the group.
        ends: heap of (value of ``served`` at the end of a flow, number of the flow, callback), one for each flow.
    """

    uses: Uses
    limit: float | None
    rate: float = 0.0
    served: float = 0.0
    ends: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)


class Fluid:
    """Flows that share resources. A resource without an entry in ``capacity`` has no limit."""

    def __init__(self, capacity: Mapping[Hashable, float]) -> None:
        self.capacity = dict(capacity)
        self._groups: dict[tuple[Uses, float | None], FlowGroup] = {}
        self._flows, self._is_stale = 0, False

    def add(self, amount: float, uses: Uses, on_end: Callable[[], None], limit: float | None = None) -> None:
        """Add a flow that starts now and transfers ``amount``, for example in bytes, at a rate of at most ``limit``.

        When ``amount`` has been transferred, :meth:`advance` returns ``on_end``.
        """
        group = self._groups.setdefault((uses, limit), FlowGroup(uses, limit))
        self._flows += 1
        heapq.heappush(group.ends, (group.served + amount, self._flows, on_end))
        self._is_stale = True

    def used(self, resource: Hashable) -> float:
        """Return the fraction of a resource's capacity that is in use."""
        self._update_rates()
        users = ((group, weight) for group in self._groups.values() for name, weight in group.uses if name == resource)
        taken = sum(group.rate * weight * len(group.ends) for group, weight in users)
        return min(1.0, taken / self.capacity[resource])

    def _update_rates(self) -> None:
        if self._is_stale:
            set_fair_rates(self._groups.values(), self.capacity)
            self._is_stale = False

    def next_end_s(self) -> float | None:
        """Return the seconds until the first flow ends if no other flow is added; None if there are no flows."""
        self._update_rates()
        ends = ((group.ends[0][0] - group.served) / group.rate for group in self._groups.values())
        return min(ends, default=None)

    def advance(self, seconds: float) -> list[Callable[[], None]]:
        """Advance time, at most to the next end of a flow, and return the callbacks of the flows that end."""
        ended: list[Callable[[], None]] = []
        for key, group in list(self._groups.items()):
            group.served = group.ends[0][0] if group.rate == float("inf") else group.served + group.rate * seconds
            while group.ends and group.ends[0][0] <= group.served * _EQUAL:
                ended.append(heapq.heappop(group.ends)[2])
                self._is_stale = True
            if not group.ends:
                del self._groups[key]
        return ended


def set_fair_rates(groups: Iterable[FlowGroup], capacity: Mapping[Hashable, float]) -> None:
    """Set the max-min fair rate of every group: rates grow together, and each stops at a full resource or its limit."""
    growing, left = list(groups), dict(capacity)
    while growing:
        load: dict[Hashable, float] = {}
        for group in growing:
            for resource, weight in group.uses:
                if resource in left:
                    load[resource] = load.get(resource, 0.0) + weight * len(group.ends)
        levels = {resource: max(left[resource], 0.0) / weight for resource, weight in load.items() if weight > 0}
        limits = [group.limit for group in growing if group.limit is not None]
        level = min([*levels.values(), *limits], default=float("inf"))
        full = {resource for resource, value in levels.items() if value <= level * _EQUAL}
        still_growing = []
        for group in growing:
            limited = group.limit is not None and group.limit <= level * _EQUAL
            if limited or level == float("inf") or any(resource in full for resource, _ in group.uses):
                group.rate = level
                for resource, weight in group.uses:
                    if resource in left:
                        left[resource] -= level * weight * len(group.ends)
            else:
                still_growing.append(group)
        growing = still_growing
