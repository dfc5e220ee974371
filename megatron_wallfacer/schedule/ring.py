"""The ring: the block of a rank in each ring step, and the paths of a block and of its gradient.

A block leaves its origin rank and reaches every position of the ring. On a single ring the block hops from one position
to the next. In bidirectional rings the block hops half way around in each direction. On a double ring the block hops
along the outer ring to one rank of each inner ring. From there the block also hops around the inner ring.

Ranks on the path of a block accumulate the gradient of the block and send the gradient to the origin. The origin adds
its own contribution. On single, bidirectional and double rings, a block and its gradient make R - 1 hops each.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_wallfacer.schedule.grid import Grid


@dataclass(frozen=True)
class Hop:
    """One end of a message between two positions of the ring.

    Attributes:
        step: ring step in which the receiver uses the message.
        closes_pass: whether the message carries the gradient that a whole pass of the inner ring has accumulated.
    """

    axis: str
    peer: int
    step: int
    closes_pass: bool = False


@dataclass(frozen=True)
class RingStep:
    """The block of the ring operand that a rank has in one ring step, and the messages of the block and its gradient.

    Attributes:
        origin: rank that has the block in ring step 0. It can differ from this rank only along the rings.
        source: message that brings the block to this rank; None for the local block.
        destinations: messages that bring the block to further ranks.
        gradient_sources: messages that bring partial gradients of the block to this rank.
        gradient_destination: message with the accumulated gradient to the next rank of its path; None at the origin
            rank.
    """

    origin: int
    source: Hop | None
    destinations: tuple[Hop, ...]
    gradient_sources: tuple[Hop, ...]
    gradient_destination: Hop | None


def ring_steps(grid: Grid, rank: int, *, bidirectional: bool = False) -> tuple[RingStep, ...]:
    """Return the R ring steps of a rank in the order in which blocks arrive, the local block first.

    With ``bidirectional``, each block is sent half way around a single ring in both directions.
    """
    if bidirectional:
        return _bidirectional_steps(grid, rank)
    return tuple(
        _ring_step(grid, rank, outer, inner) for outer in range(grid.ring_outer) for inner in range(grid.ring_inner)
    )


def block_origin(grid: Grid, rank: int, step: int) -> int:
    """Return the origin of the block that a rank has in a ring step of a ring with one direction."""
    outer, inner = divmod(step, grid.ring_inner)
    return peer_along(grid, rank, -outer, -inner)


def block_holder(grid: Grid, rank: int, origin: int) -> int:
    """Return the rank that holds ``rank``'s block in the ring step in which ``rank`` holds ``origin``'s block."""
    here, there = grid.coordinates(rank), grid.coordinates(origin)
    return peer_along(grid, rank, *(here[axis] - there[axis] for axis in ("ring_outer", "ring_inner")))


def peer_along(grid: Grid, rank: int, outer: int, inner: int) -> int:
    """Return the rank ``outer`` positions ahead on the outer ring and ``inner`` positions ahead on the inner ring."""
    coordinates = grid.coordinates(rank)
    coordinates["ring_outer"] = (coordinates["ring_outer"] + outer) % grid.ring_outer
    coordinates["ring_inner"] = (coordinates["ring_inner"] + inner) % grid.ring_inner
    return grid.rank(coordinates)


def _ring_step(grid: Grid, rank: int, outer_step: int, inner_step: int) -> RingStep:
    inner, outer = grid.ring_inner, grid.ring_outer
    step = outer_step * inner + inner_step

    def hop(axis: str, distance: int, receiver_step: int, closes_pass: bool = False) -> Hop:
        distances = (distance, 0) if axis == "ring_outer" else (0, distance)
        return Hop(axis, peer_along(grid, rank, *distances), receiver_step, closes_pass)

    destinations = [hop("ring_outer", 1, step + inner)] if inner_step == 0 and outer_step < outer - 1 else []
    destinations += [hop("ring_inner", 1, step + 1)] if inner_step < inner - 1 else []
    source = gradient_destination = None
    gradient_sources = []
    if inner_step > 0:
        source = hop("ring_inner", -1, step)
        gradient_sources += [hop("ring_inner", -1, step)] if inner_step > 1 else []
        ends_pass = inner_step == inner - 1
        gradient_destination = hop(
            "ring_inner", 1, outer_step * inner if ends_pass else step + 1, closes_pass=ends_pass
        )
    else:
        gradient_sources += [hop("ring_inner", -1, step, closes_pass=True)] if inner > 1 else []
        if outer_step > 0:
            source = hop("ring_outer", -1, step)
            gradient_sources += [hop("ring_outer", -1, step)] if outer_step > 1 else []
            gradient_destination = hop("ring_outer", 1, step + inner if outer_step < outer - 1 else 0)
        else:
            gradient_sources += [hop("ring_outer", -1, 0)] if outer > 1 else []
    return RingStep(
        block_origin(grid, rank, step), source, tuple(destinations), tuple(gradient_sources), gradient_destination
    )


def _bidirectional_steps(grid: Grid, rank: int) -> tuple[RingStep, ...]:
    """Return the ring steps of a bidirectional ring. Blocks of the two directions arrive alternately."""
    axis = "ring_inner" if grid.ring_inner > 1 else "ring_outer"
    ring, position = grid.neighbours(rank, axis), grid.coordinates(rank)[axis]
    size = len(ring)
    # Blocks of direction 1 arrive from lower positions in steps 1, 3, 5, ..., blocks of direction -1 in steps 2, 4, ...
    distances = {1: [*range(1, size // 2 + 1)], -1: [*range(1, (size - 1) // 2 + 1)]}

    def step_of(direction: int, distance: int) -> int:
        return 2 * distance - (direction == 1)

    def peer(offset: int) -> int:
        return ring[(position + offset) % size]

    steps = {}
    for direction, reach in distances.items():
        for distance in reach:
            is_last = distance == reach[-1]
            step = step_of(direction, distance)
            # The last block of a direction has the farthest origin, to which its gradient is sent in one hop.
            direct = Hop(axis, peer(-direction * distance), 0, direction == 1) if is_last else None
            steps[step] = RingStep(
                origin=peer(-direction * distance),
                source=Hop(axis, peer(-direction), step),
                destinations=() if is_last else (Hop(axis, peer(direction), step_of(direction, distance + 1)),),
                gradient_sources=(Hop(axis, peer(-direction), step),) if distance > 1 else (),
                gradient_destination=direct or Hop(axis, peer(direction), step_of(direction, distance + 1)),
            )
    directions = [direction for direction, reach in distances.items() if reach]
    steps[0] = RingStep(
        origin=rank,
        source=None,
        destinations=tuple(Hop(axis, peer(direction), step_of(direction, 1)) for direction in directions),
        gradient_sources=tuple(
            Hop(axis, peer(direction * distances[direction][-1]), 0, direction == 1) for direction in directions
        ),
        gradient_destination=None,
    )
    return tuple(steps[step] for step in sorted(steps))
