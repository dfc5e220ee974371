"""Classes of ranks that behave alike, so that one simulated rank represents several.

A shift adds the same distance, modulo the size of the axis, to the coordinate of every rank along one axis. If all
ranks are shifted, schedules stay the same apart from rank numbers. This is not true if ``kv_order`` is not ``native``.
If ranks with the same node, NIC and switches still have these in common after the shift, simulated times do not change.
Ranks that such shifts map to each other form a *class*. The simulation of one rank gives the times of its whole class.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from math import lcm

from megatron_wallfacer.schedule.grid import AXES, Grid


class Symmetry:
    """Groups of ranks that take equal times in a simulation. With ``every_rank`` each rank is its own group.

    ``unit_sizes`` has the numbers of consecutive ranks that share a NIC, a node or a switch.
    """

    def __init__(self, grid: Grid, unit_sizes: Sequence[int], *, every_rank: bool = False) -> None:
        self.grid, self._every_rank = grid, every_rank
        self._periods = {axis: grid.size_of(axis) for axis in AXES}
        if not every_rank:
            self._periods |= _periods(grid, unit_sizes)
        # A simulation calls these functions for every message.
        self.class_of, self.offset, self.translated = map(cache, (self.class_of, self.offset, self.translated))

    @property
    def representatives(self) -> tuple[int, ...]:
        """Return one rank of each class of ranks with equal times, in ascending order."""
        ranges = [range(self._periods[axis]) for axis in AXES]
        return tuple(sorted(self.grid.rank(dict(zip(AXES, place, strict=True))) for place in product(*ranges)))

    def class_of(self, rank: int) -> int:
        """Return the rank whose simulation also gives the times of ``rank``."""
        here = self.grid.coordinates(rank)
        return self.grid.rank({axis: here[axis] % self._periods[axis] for axis in AXES})

    def offset(self, rank: int, peer: int) -> tuple[int, ...]:
        """Return the distance from a rank to a peer along each axis."""
        here, there = self.grid.coordinates(rank), self.grid.coordinates(peer)
        return tuple((there[axis] - here[axis]) % self.grid.size_of(axis) for axis in AXES)

    def program_rank(self, rank: int) -> int:
        """Return a rank with the same program as ``rank``, apart from peers. Without ``every_rank``, head is 0."""
        return rank if self._every_rank else self.grid.rank(self.grid.coordinates(rank) | {"head": 0})

    def translated(self, rank: int, start: int, end: int) -> int:
        """Shift ``rank`` by the distance from ``start`` to ``end`` along each axis, and return the resulting rank."""
        if start == end:
            return rank
        offset, here = self.offset(start, end), self.grid.coordinates(rank)
        moved = ((here[axis] + by) % self.grid.size_of(axis) for axis, by in zip(AXES, offset, strict=True))
        return self.grid.rank(dict(zip(AXES, moved, strict=True)))

    def count(self, rank: int, first: int, ranks: int) -> int:
        """Count the ranks from ``first`` to ``first + ranks - 1`` that have the same times as ``rank``."""
        last = min(first + ranks, self.grid.cp_size)
        return [self.class_of(other) for other in range(first, last)].count(self.class_of(rank))

    def unit(self, first: int, ranks: int) -> int:
        """Return an identifier of a NIC, node or switch, given its ranks. It is equal for links with equal times."""
        return min(self.class_of(rank) for rank in range(first, min(first + ranks, self.grid.cp_size)))


def _periods(grid: Grid, unit_sizes: Sequence[int]) -> dict[str, int]:
    # A shift along each axis after which simulated times stay the same; the size of the axis if none is found.
    periods, stride = {}, 1
    for axis in grid.placement:
        size = grid.size_of(axis)
        period = lcm(1, *(_period(stride, size, unit) for unit in unit_sizes))
        periods[axis] = period if size % period == 0 else size
        stride *= size
    return periods


def _period(stride: int, size: int, unit: int) -> int:
    """Return a shift along an axis that maps each group of ``unit`` consecutive ranks to a whole group."""
    if unit % (stride * size) == 0 or stride % unit == 0:
        return 1
    if unit % stride == 0 and (stride * size) % unit == 0:
        return unit // stride
    return size
