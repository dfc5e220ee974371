"""Classes of ranks that behave alike, so that one simulated rank represents several.

A shift moves all ranks by the same distance along an axis of the grid. The last rank of an axis is followed by the
first. A rank has the same schedule as the rank that takes its place, apart from rank numbers. Schedules in the
WallFacer paper's order of K and V do not have this symmetry. If a shift also keeps the ranks of each node, NIC and
switch together, it does not change any simulated time. Two ranks form a *class* if such shifts move one rank to the
place of the other rank. The simulation of one rank also gives the times of all other ranks in its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from math import lcm

from megatron_wallfacer.schedule.grid import AXES, Grid


class Symmetry:
    """Groups of ranks with equal times, for a grid on a cluster. With ``every_rank`` each rank is its own group.

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
        """Return the rank of head coordinate 0 whose program equals the program of ``rank``, apart from the peers."""
        return rank if self._every_rank else self.grid.rank(self.grid.coordinates(rank) | {"head": 0})

    def translated(self, rank: int, start: int, end: int) -> int:
        """Shift ``rank`` by the distance from ``start`` to ``end`` along each axis, and return the resulting rank."""
        if start == end:
            return rank
        offset, here = self.offset(start, end), self.grid.coordinates(rank)
        moved = ((here[axis] + by) % self.grid.size_of(axis) for axis, by in zip(AXES, offset, strict=True))
        return self.grid.rank(dict(zip(AXES, moved, strict=True)))

    def count(self, rank: int, first: int, ranks: int) -> int:
        """Count the ranks from ``first`` to ``first + ranks - 1`` that are in the class of ``rank``."""
        last = min(first + ranks, self.grid.cp_size)
        return [self.class_of(other) for other in range(first, last)].count(self.class_of(rank))

    def unit(self, first: int, ranks: int) -> int:
        """Return a number for a NIC, node or switch, given its ranks. Links with equal times get the same number."""
        return min(self.class_of(rank) for rank in range(first, min(first + ranks, self.grid.cp_size)))


def _periods(grid: Grid, unit_sizes: Sequence[int]) -> dict[str, int]:
    """Return, for each axis, the smallest shift after which ranks that shared a NIC, node or switch share one again."""
    periods, stride = {}, 1
    for axis in grid.placement:
        size = grid.size_of(axis)
        period = lcm(1, *(_period(stride, size, unit) for unit in unit_sizes))
        periods[axis] = period if size % period == 0 else size
        stride *= size
    return periods


def _period(stride: int, size: int, unit: int) -> int:
    """Return the smallest shift along an axis after which ranks that shared a unit share a unit again."""
    if unit % (stride * size) == 0 or stride % unit == 0:
        return 1
    if unit % stride == 0 and (stride * size) % unit == 0:
        return unit // stride
    return size
