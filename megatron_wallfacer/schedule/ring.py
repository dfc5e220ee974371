"""The ring: which block visits a rank when, where it comes from and goes to, and how its gradient comes home.

A block leaves its home and visits every position of the ring. On a single ring it goes from one to the next, or, in
both directions at once, half way round. On a double ring it goes round the inner ring of its home; meanwhile its home
sends it to the next inner ring, where it goes round in its turn, and so on.

Its gradient is summed along the same paths and ends at home; the part computed at home never leaves. So the rider and
its gradient make R - 1 hops each, whatever the shape of the ring.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_wallfacer.schedule.grid import Grid


@dataclass(frozen=True)
class Link:
    """One end of a message: along an axis, to or from a peer, for a visit at the receiver's.

    Attributes:
        axis: along which it goes.
        peer: the other end.
        visit: index of the receiver's visit that it is for.
        closes: it brings what a turn of the inner ring has summed, and not what stands one position before.
    """

    axis: str
    peer: int
    visit: int
    closes: bool = False


@dataclass(frozen=True)
class Visit:
    """One block at this rank.

    Attributes:
        origin: the rank, of those that differ from this one along the ring, at whose place the block is at home.
        arrives: where it comes from; None for the rank's own.
        forwards: where it is sent on.
        sums: what is added to its gradient here.
        returns: where the sum goes; None at home.
        turn: which turn of the inner ring it is in.
    """

    origin: int
    arrives: Link | None
    forwards: tuple[Link, ...]
    sums: tuple[Link, ...]
    returns: Link | None
    turn: int


def visits(grid: Grid, rank: int, *, bidirectional: bool = False) -> tuple[Visit, ...]:
    """The R visits at ``rank`` in the order in which they are computed, its own block first."""
    if bidirectional:
        return _both_ways(grid, rank)
    return tuple(_visit(grid, rank, turn, step) for turn in range(grid.ring_outer) for step in range(grid.ring_inner))


def origin_of(grid: Grid, rank: int, visit: int) -> int:
    """At whose place the block of a visit is at home, on a ring in one direction."""
    turn, step = divmod(visit, grid.ring_inner)
    return peer_along(grid, rank, -turn, -step)


def host_of(grid: Grid, home: int, origin: int) -> int:
    """The rank that has the block of ``home`` when ``home`` has that of ``origin``: as far away, the other way."""
    here, there = grid.coordinates(home), grid.coordinates(origin)
    return peer_along(grid, home, *(here[axis] - there[axis] for axis in ("ring_outer", "ring_inner")))


def peer_along(grid: Grid, rank: int, outer: int, inner: int) -> int:
    """The rank so many positions further along each ring."""
    here = grid.coordinates(rank)
    here["ring_outer"] = (here["ring_outer"] + outer) % grid.ring_outer
    here["ring_inner"] = (here["ring_inner"] + inner) % grid.ring_inner
    return grid.rank(here)


def _visit(grid: Grid, rank: int, turn: int, step: int) -> Visit:
    inner, outer = grid.ring_inner, grid.ring_outer
    index = turn * inner + step

    def beside(axis: str, way: int, visit: int, closes: bool = False) -> Link:
        at = (way, 0) if axis == "ring_outer" else (0, way)
        return Link(axis, peer_along(grid, rank, *at), visit, closes)

    forwards = [beside("ring_outer", 1, index + inner)] if step == 0 and turn < outer - 1 else []
    forwards += [beside("ring_inner", 1, index + 1)] if step < inner - 1 else []
    arrives = returns = None
    sums = []
    if step > 0:
        arrives = beside("ring_inner", -1, index)
        sums += [beside("ring_inner", -1, index)] if step > 1 else []
        last = step == inner - 1
        returns = beside("ring_inner", 1, turn * inner if last else index + 1, closes=last)
    else:
        sums += [beside("ring_inner", -1, index, closes=True)] if inner > 1 else []
        if turn > 0:
            arrives = beside("ring_outer", -1, index)
            sums += [beside("ring_outer", -1, index)] if turn > 1 else []
            returns = beside("ring_outer", 1, index + inner if turn < outer - 1 else 0)
        else:
            sums += [beside("ring_outer", -1, 0)] if outer > 1 else []
    return Visit(origin_of(grid, rank, index), arrives, tuple(forwards), tuple(sums), returns, turn)


def _both_ways(grid: Grid, rank: int) -> tuple[Visit, ...]:
    """A single ring of which blocks go half the way in each direction; the two directions take turns."""
    axis = "ring_inner" if grid.ring_inner > 1 else "ring_outer"
    ring, position = grid.neighbours(rank, axis), grid.coordinates(rank)[axis]
    size = len(ring)
    # Blocks that go up arrive from below at visits 1, 3, 5, ...; those that go down at 2, 4, 6, ...
    distances = {1: [*range(1, size // 2 + 1)], -1: [*range(1, (size - 1) // 2 + 1)]}

    def index(way: int, distance: int) -> int:
        return 2 * distance - (way == 1)

    def at(offset: int) -> int:
        return ring[(position + offset) % size]

    found = {}
    for way, reach in distances.items():
        for distance in reach:
            last = distance == reach[-1]
            here = index(way, distance)
            # The last visitor of a direction is the farthest; what it has summed goes home in one jump.
            returns = Link(axis, at(-way * distance), 0, way == 1) if last else None
            found[here] = Visit(
                origin=at(-way * distance),
                arrives=Link(axis, at(-way), here),
                forwards=() if last else (Link(axis, at(way), index(way, distance + 1)),),
                sums=(Link(axis, at(-way), here),) if distance > 1 else (),
                returns=returns or Link(axis, at(way), index(way, distance + 1)),
                turn=0,
            )
    ways = [way for way, reach in distances.items() if reach]
    found[0] = Visit(
        origin=rank,
        arrives=None,
        forwards=tuple(Link(axis, at(way), index(way, 1)) for way in ways),
        sums=tuple(Link(axis, at(way * distances[way][-1]), 0, way == 1) for way in ways),
        returns=None,
        turn=0,
    )
    return tuple(found[i] for i in sorted(found))
