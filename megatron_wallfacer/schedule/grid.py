"""The grid, which divides the P x P square of (query shard, key shard) pairs among P ranks.

A rank has one coordinate per axis. Ranks that differ only along one axis are related as follows:

* ``head``: ranks share tokens and have different heads (all-to-all before and after attention).
* ``team``: ranks share queries (Q is gathered, partial O is combined).
* ``kv_team``: ranks share keys and values (K and V are gathered, dK and dV are summed).
* ``ring_outer``, ``ring_inner``: ranks have no data in common. Blocks hop from one rank to the next. A single ring uses
  ``ring_outer``. On a double ring a block reaches all ranks of an inner ring between two hops of the outer ring.

The product of the axis sizes is the context-parallel size P.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt

from megatron_wallfacer.errors import OptionError

AXES: tuple[str, ...] = ("head", "team", "kv_team", "ring_outer", "ring_inner")

#: Order of the axes, fastest varying first. The axis with the most traffic varies fastest.
DEFAULT_PLACEMENT: tuple[str, ...] = ("head", "ring_inner", "team", "ring_outer", "kv_team")
#: The two placements of the WallFacer paper (arXiv 2407.00611, section 4.4), as axis orders.
TEAMS_ADJACENT: tuple[str, ...] = ("head", "team", "ring_inner", "ring_outer", "kv_team")
RINGS_ADJACENT: tuple[str, ...] = ("ring_inner", "ring_outer", "team", "kv_team", "head")


@dataclass(frozen=True)
class Grid:
    """Sizes of the axes and their placement over the ranks of the context-parallel group.

    Args:
        head: U, number of ranks that share tokens and divide heads.
        team: C, number of ranks that share the same queries.
        kv_team: G, number of ranks that share the same keys and values.
        ring_outer: number of ranks of the outer ring.
        ring_inner: number of ranks of the inner ring. The ring size R is ``ring_outer`` x ``ring_inner``.
        placement: axes in the order in which they vary over the ranks, fastest first. Axes of size 1 may be omitted.
            The grid removes axes of size 1, so that equal grids compare equal.

    Raises:
        OptionError: A size is below 1, or ``placement`` does not name each axis of size > 1 exactly once.
    """

    head: int = 1
    team: int = 1
    kv_team: int = 1
    ring_outer: int = 1
    ring_inner: int = 1
    placement: tuple[str, ...] = DEFAULT_PLACEMENT

    def __post_init__(self) -> None:
        for axis in AXES:
            if not isinstance(self.size_of(axis), int) or self.size_of(axis) < 1:
                raise OptionError(f"{axis}_size", self.size_of(axis), "a positive number of ranks")
        wide = [axis for axis in AXES if self.size_of(axis) > 1]
        known = set(self.placement) <= set(AXES) and len(set(self.placement)) == len(self.placement)
        if not known or not set(wide) <= set(self.placement):
            raise OptionError(
                "placement", ",".join(self.placement), f"an order of {', '.join(wide or AXES)}, each once"
            )
        object.__setattr__(self, "placement", tuple(axis for axis in self.placement if axis in wide))

    @property
    def cp_size(self) -> int:
        """Return P, the number of context-parallel ranks."""
        return self.head * self.team * self.kv_team * self.ring_outer * self.ring_inner

    @property
    def ring(self) -> int:
        """Return R, the number of positions on the ring: ``ring_outer`` x ``ring_inner``."""
        return self.ring_outer * self.ring_inner

    def size_of(self, axis: str) -> int:
        """Return the number of ranks along one axis."""
        return getattr(self, axis)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the coordinate of a rank along each axis, given the rank's index in the context-parallel group."""
        along = {axis: rank // stride % size for axis, (stride, size) in self._strides.items()}
        return dict.fromkeys(AXES, 0) | along

    def rank(self, coordinates: Mapping[str, int]) -> int:
        """Return the rank with the given coordinates, as the inverse of :meth:`coordinates`."""
        return sum(stride * coordinates[axis] for axis, (stride, _) in self._strides.items())

    def neighbours(self, rank: int, axis: str) -> tuple[int, ...]:
        """Return ``rank`` and all ranks that differ from ``rank`` only along ``axis``, in the order of the axis."""
        stride, size = self._strides.get(axis, (1, 1))
        first = rank - stride * (rank // stride % size)
        return tuple(range(first, first + stride * size, stride))

    @cached_property
    def _strides(self) -> dict[str, tuple[int, int]]:
        """Return (distance of neighbouring ranks, number of ranks) for each axis of the placement."""
        found, stride = {}, 1
        for axis in self.placement:
            found[axis] = stride, self.size_of(axis)
            stride *= self.size_of(axis)
        return found

    def __str__(self) -> str:
        return " x ".join(f"{axis} {self.size_of(axis)}" for axis in AXES if self.size_of(axis) > 1) or "one rank"


def divisors(number: int) -> tuple[int, ...]:
    """Return all divisors of a number in ascending order."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return (*small, *(number // d for d in reversed(small) if d * d != number))


def factorisations(number: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
    """Yield every way to write a number as the product of the sizes of some axes."""
    first, *rest = axes
    if not rest:
        yield {first: number}
        return
    for size in divisors(number):
        for others in factorisations(number // size, rest):
            yield {first: size, **others}


def axes_inside(grid: Grid, nodes: Sequence[str]) -> tuple[str, ...]:
    """Return the axes that have several ranks and stay inside a node. ``nodes`` has the node of each rank."""

    def is_inside(axis: str) -> bool:
        return all(len({nodes[peer] for peer in grid.neighbours(rank, axis)}) == 1 for rank in range(grid.cp_size))

    return tuple(filter(is_inside, grid.placement))


def describe_nodes(grid: Grid, nodes: Sequence[str]) -> str:
    """Return text about the ranks per node, and about the axes that stay inside a node or cross nodes."""
    counts = sorted({nodes.count(node) for node in set(nodes)})
    if len(set(nodes)) == 1:
        return "All context-parallel ranks are on one node."
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    inside = axes_inside(grid, nodes)
    across = [axis for axis in grid.placement if axis not in inside]
    return (
        f"{len(nodes)} context-parallel ranks are on {len(set(nodes))} nodes, {each} on each. "
        f"Axes inside a node: {', '.join(inside) or 'none'}. Axes across nodes: {', '.join(across) or 'none'}."
    )
