"""Which ranks are alike, so that one stands for many.

A grid is a torus: moving every rank by the same distance along an axis turns its schedules into each other, but for
the published order of K and V. Where such a move also turns nodes into nodes, cards into cards and switches into
switches, it changes nothing that takes time. Ranks that such moves turn into each other are a *class*; playing one rank
of each class tells what all of them do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import lcm

from megatron_wallfacer.schedule.grid import AXES, Grid


class Symmetry:
    """Classes of the ranks of a grid on a cluster.

    Args:
        grid: axes and placement.
        unit_sizes: ranks of each kind of unit (card, node, switch); a unit is so many consecutive ranks.
        folded: False to let every rank be a class of its own.
    """

    def __init__(self, grid: Grid, unit_sizes: Sequence[int], *, folded: bool = True) -> None:
        self.grid, self._folded = grid, folded
        self._steps = {axis: grid.size_of(axis) for axis in AXES}
        if folded:
            self._steps |= _steps(grid, unit_sizes)
        self._class_of = lru_cache(maxsize=None)(self._find_class)
        self._offset = lru_cache(maxsize=None)(self._find_offset)
        self._moved = lru_cache(maxsize=None)(self._move)

    @property
    def representatives(self) -> tuple[int, ...]:
        """One rank of each class, ascending."""
        ranges = [range(self._steps[axis]) for axis in AXES]
        return tuple(sorted(self.grid.rank(dict(zip(AXES, at, strict=True))) for at in product(*ranges)))

    def class_of(self, rank: int) -> int:
        """The representative of a rank."""
        return self._class_of(rank)

    def offset(self, rank: int, peer: int) -> tuple[int, ...]:
        """How far a peer is along each axis: the same for all ranks of a class and their peers."""
        return self._offset(rank, peer)

    def twin(self, rank: int) -> int:
        """The rank with the first heads: its program is that of ``rank`` but for who its peers are."""
        return self.grid.rank(self.grid.coordinates(rank) | {"head": 0}) if self._folded else rank

    def moved(self, rank: int, start: int, end: int) -> int:
        """Where ``rank`` comes to when all ranks are moved so that ``start`` comes to ``end``."""
        return self._moved(rank, start, end)

    def count(self, rank: int, first: int, ranks: int) -> int:
        """Ranks of the class of ``rank`` among some consecutive ones."""
        wanted = self.class_of(rank)
        return sum(self.class_of(other) == wanted for other in range(first, min(first + ranks, self.grid.cp_size)))

    def unit(self, first: int, ranks: int) -> int:
        """The least class among some consecutive ranks: the same for units that are turned into each other."""
        return min(self.class_of(rank) for rank in range(first, min(first + ranks, self.grid.cp_size)))

    def _find_offset(self, rank: int, peer: int) -> tuple[int, ...]:
        here, there = self.grid.coordinates(rank), self.grid.coordinates(peer)
        return tuple((there[axis] - here[axis]) % self.grid.size_of(axis) for axis in AXES)

    def _move(self, rank: int, start: int, end: int) -> int:
        if start == end:
            return rank
        offset, here = self.offset(start, end), self.grid.coordinates(rank)
        moved = ((here[axis] + by) % self.grid.size_of(axis) for axis, by in zip(AXES, offset, strict=True))
        return self.grid.rank(dict(zip(AXES, moved, strict=True)))

    def _find_class(self, rank: int) -> int:
        here = self.grid.coordinates(rank)
        return self.grid.rank({axis: here[axis] % self._steps[axis] for axis in AXES})


def _steps(grid: Grid, unit_sizes: Sequence[int]) -> dict[str, int]:
    """By axis, the least distance by which all ranks may be moved along it. The size of the axis: not at all."""
    steps, stride = {}, 1
    for axis in grid.placement:
        size = grid.size_of(axis)
        step = lcm(1, *(_step(stride, size, unit) for unit in unit_sizes))
        steps[axis] = step if size % step == 0 else size
        stride *= size
    return steps


def _step(stride: int, size: int, unit: int) -> int:
    """The same for one kind of unit, given how far apart neighbours along the axis are."""
    if unit % (stride * size) == 0 or stride % unit == 0:
        return 1
    if unit % stride == 0 and (stride * size) % unit == 0:
        return unit // stride
    return size
