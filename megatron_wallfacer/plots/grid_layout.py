"""Compute the positions of ranks in the plot of a grid.

A ring is drawn as a circle. The members of a team are drawn on a line from the centre outwards, a *spoke* of the
circle. With ``kv_team`` > 1 there are several such circles. For a double ring, inner rings are drawn as small circles
along a large circle.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, cos, pi, sin, sqrt

from megatron_wallfacer.plots.grid_rings import is_double, step_axis
from megatron_wallfacer.schedule.grid import Grid, divisors

# All lengths are in diameters of a rank.
RADIUS = 0.5  # radius of a rank
MEMBER_GAP = 1.16  # distance between neighbours in a team
HEADS_GAP = 1.42  # distance between team members that split heads with other ranks
SPOKE_GAP = 1.9  # distance between the inner ends of two spokes, which leaves space for an arrow
INNER_RING_GAP = 1.2  # distance between the inner rings of a double ring
CIRCLE_GAP = 0.5
MIN_SIDE = 4.0  # minimum side of the drawing, so that one rank alone does not fill the page

Position = tuple[float, float]


@dataclass(frozen=True)
class GridLayout:
    """Positions of ranks and circles in the plot of a grid.

    Attributes:
        half_side: half the side of the square around one circle.
        centres: centre of each circle, by the coordinate along ``kv_team``.
        inner_radius: radius of the circle around an inner ring and its ranks, or 0 for a single ring.
        ring_centres: centre of the circle that shows the ring of each rank.
        positions: position of each rank.
    """

    half_side: float
    centres: tuple[Position, ...]
    inner_radius: float
    ring_centres: tuple[Position, ...]
    positions: tuple[Position, ...]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top edges of the drawing."""
        xs, ys = zip(*self.centres, strict=True)
        margin = max(self.half_side, MIN_SIDE / 2)
        return min(xs) - margin, max(xs) + margin, min(ys) - margin, max(ys) + margin


def layout_of(grid: Grid) -> GridLayout:
    """Return the positions of all ranks."""
    size = grid.size_of(step_axis(grid))
    offsets, depth = _block(grid) if size == 1 else _spoke(grid)
    hub = max(SPOKE_GAP / 2 / sin(pi / size), 1.15) if size > 1 else 0.0
    half_side = (hub + depth + 0.36 if size > 1 else depth + 0.6) + RADIUS
    inner_radius, orbit = 0.0, 0.0
    if is_double(grid):
        inner_radius = half_side
        orbit = (inner_radius + INNER_RING_GAP / 2) / sin(pi / grid.ring_outer)
        half_side = orbit + inner_radius
    columns = ceil(sqrt(grid.kv_team))
    pitch = 2 * half_side + CIRCLE_GAP
    centres = tuple((index % columns * pitch, -(index // columns) * pitch) for index in range(grid.kv_team))
    ring_centres, positions = [], []
    for rank in range(grid.cp_size):
        coordinates = grid.coordinates(rank)
        ring_angle = _angle(coordinates["ring_outer"], grid.ring_outer)
        ring_centre = on_circle(centres[coordinates["kv_team"]], orbit, ring_angle)
        across, along = offsets[coordinates["team"] * grid.head + coordinates["head"]]
        if size > 1:
            positions.append(on_circle(ring_centre, hub + along, _angle(coordinates[step_axis(grid)], size)))
        else:
            positions.append((ring_centre[0] + across, ring_centre[1] + along))
        ring_centres.append(ring_centre)
    return GridLayout(half_side, centres, inner_radius, tuple(ring_centres), tuple(positions))


def on_circle(centre: Position, radius: float, angle: float) -> Position:
    """Return the point of a circle at an angle in radians, counter-clockwise from the right."""
    return centre[0] + radius * cos(angle), centre[1] + radius * sin(angle)


def _angle(index: int, size: int) -> float:
    """Return the angle in radians of one of ``size`` positions, clockwise from the top."""
    return pi / 2 - 2 * pi * index / size


def _spoke(grid: Grid) -> tuple[list[Position], float]:
    """Return the positions (x, y) of a team's ranks in a straight line, outermost first, and the length of the line."""
    member = MEMBER_GAP if grid.head == 1 else (grid.head - 1) * MEMBER_GAP + HEADS_GAP
    offsets = [team * member + head * MEMBER_GAP for team in range(grid.team) for head in range(grid.head)]
    return [(0.0, offsets[-1] - offset) for offset in offsets], offsets[-1]


def _block(grid: Grid) -> tuple[list[Position], float]:
    """Return the positions (x, y) of a block of ranks around (0, 0), and its extent, for a grid without a ring."""
    if grid.team > 1:
        line, depth = _spoke(grid)
        return [(across, along - depth / 2) for across, along in line], depth / 2
    columns = next(size for size in divisors(grid.head) if size * size >= grid.head)
    rows = grid.head // columns
    offsets = [
        ((index % columns - (columns - 1) / 2) * MEMBER_GAP, ((rows - 1) / 2 - index // columns) * MEMBER_GAP)
        for index in range(grid.head)
    ]
    return offsets, (columns - 1) * MEMBER_GAP / 2
