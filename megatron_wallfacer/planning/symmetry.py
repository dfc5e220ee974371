"""Classes of ranks that behave alike, so that one simulated rank represents several.

A grid is a torus. A translation of all ranks along an axis maps their schedules onto each other, except with the order
of K and V in the WallFacer paper. If a translation also maps nodes onto nodes, NICs onto NICs and switches onto
switches, the translation preserves all times. Ranks that such translations map onto each other form a *class*. A
simulation of one rank per class gives the times of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from math import lcm

from megatron_wallfacer.schedule.grid import AXES, Grid


class Symmetry:
    """Classes of the ranks of a grid on a cluster, or with ``every_rank`` one class per rank.

    ``unit_sizes`` are the ranks per unit, for each kind of unit (NIC, node, switch). A unit has consecutive ranks.
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
        """Return one rank of each class, ascending."""
        ranges = [range(self._periods[axis]) for axis in AXES]
        return tuple(sorted(self.grid.rank(dict(zip(AXES, place, strict=True))) for place in product(*ranges)))

    def class_of(self, rank: int) -> int:
        """Return the representative of the class of a rank."""
        here = self.grid.coordinates(rank)
        return self.grid.rank({axis: here[axis] % self._periods[axis] for axis in AXES})

    def offset(self, rank: int, peer: int) -> tuple[int, ...]:
        """Return the distance from a rank to a peer along each axis, which is equal for all ranks of a class."""
        here, there = self.grid.coordinates(rank), self.grid.coordinates(peer)
        return tuple((there[axis] - here[axis]) % self.grid.size_of(axis) for axis in AXES)

    def program_rank(self, rank: int) -> int:
        """Return the rank with the first heads whose program equals the program of ``rank`` except for the peers."""
        return rank if self._every_rank else self.grid.rank(self.grid.coordinates(rank) | {"head": 0})

    def translated(self, rank: int, start: int, end: int) -> int:
        """Return the image of ``rank`` under the translation that maps ``start`` to ``end``."""
        if start == end:
            return rank
        offset, here = self.offset(start, end), self.grid.coordinates(rank)
        moved = ((here[axis] + by) % self.grid.size_of(axis) for axis, by in zip(AXES, offset, strict=True))
        return self.grid.rank(dict(zip(AXES, moved, strict=True)))

    def count(self, rank: int, first: int, ranks: int) -> int:
        """Return how many of ``ranks`` consecutive ranks from ``first`` are in the class of ``rank``."""
        last = min(first + ranks, self.grid.cp_size)
        return [self.class_of(other) for other in range(first, last)].count(self.class_of(rank))

    def unit(self, first: int, ranks: int) -> int:
        """Return the smallest class in a unit, which is equal for units that translations map onto each other."""
        return min(self.class_of(rank) for rank in range(first, min(first + ranks, self.grid.cp_size)))


def _periods(grid: Grid, unit_sizes: Sequence[int]) -> dict[str, int]:
    """Return for each axis the smallest translation that preserves all units; the axis size if there is none."""
    periods, stride = {}, 1
    for axis in grid.placement:
        size = grid.size_of(axis)
        period = lcm(1, *(_period(stride, size, unit) for unit in unit_sizes))
        periods[axis] = period if size % period == 0 else size
        stride *= size
    return periods


def _period(stride: int, size: int, unit: int) -> int:
    """Return the smallest translation along an axis that preserves units of ``unit`` ranks."""
    if unit % (stride * size) == 0 or stride % unit == 0:
        return 1
    if unit % stride == 0 and (stride * size) % unit == 0:
        return unit // stride
    return size
