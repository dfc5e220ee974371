"""The grid: how the P x P square of (query shard, key shard) pairs is spread over P ranks.

A rank has one coordinate per axis. Ranks that differ only along

* ``team`` share the same queries (Q is gathered, partial O combined),
* ``kv_team`` share the same keys and values (K, V are gathered, dK, dV reduced),
* ``ring`` share nothing: blocks hop from one to the next.

The product of the axes is the context-parallel size P. Places are kept for the axes ``head`` and
``ring_outer``: an axis is one entry in :data:`AXES` and one field of :class:`Grid`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from megatron_wallfacer.errors import OptionError

AXES: tuple[str, ...] = ("team", "kv_team", "ring")

#: The two placements of the paper (section 4.4), as axis orders, fastest varying first.
TEAMS_ADJACENT: tuple[str, ...] = ("team", "ring", "kv_team")
RINGS_ADJACENT: tuple[str, ...] = ("ring", "team", "kv_team")


@dataclass(frozen=True)
class Grid:
    """Sizes of the axes and their placement over the ranks of the context-parallel group.

    Args:
        team: C, ranks that share the same queries.
        kv_team: G, ranks that share the same keys and values.
        ring: R, ranks between which blocks hop.
        placement: every axis once, fastest varying over neighbouring ranks first.

    Raises:
        OptionError: an axis below 1, or a placement that does not name every axis once.
    """

    team: int = 1
    kv_team: int = 1
    ring: int = 1
    placement: tuple[str, ...] = TEAMS_ADJACENT

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.size_of(axis) < 1:
                raise OptionError(f"{axis}_size", self.size_of(axis), "a positive number of ranks")
        if sorted(self.placement) != sorted(AXES):
            raise OptionError("placement", ",".join(self.placement), f"an order of {', '.join(AXES)}, each once")

    @property
    def cp_size(self) -> int:
        """P, the number of context-parallel ranks."""
        return prod(self.size_of(axis) for axis in AXES)

    def size_of(self, axis: str) -> int:
        """Number of ranks along one axis."""
        return getattr(self, axis)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinate of ``rank`` (its index in the context-parallel group) on every axis."""
        coordinates = {}
        for axis in self.placement:
            rank, coordinates[axis] = divmod(rank, self.size_of(axis))
        return coordinates

    def rank(self, coordinates: Mapping[str, int]) -> int:
        """Inverse of :meth:`coordinates`."""
        rank = 0
        for axis in reversed(self.placement):
            rank = rank * self.size_of(axis) + coordinates[axis]
        return rank

    def neighbours(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` along ``axis`` only, itself among them, in axis order."""
        here = self.coordinates(rank)
        return tuple(self.rank({**here, axis: x}) for x in range(self.size_of(axis)))

    def __str__(self) -> str:
        return " x ".join(f"{axis} {self.size_of(axis)}" for axis in AXES)
