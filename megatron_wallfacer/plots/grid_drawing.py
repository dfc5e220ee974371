"""The ranks as wheels: teams are spokes, rings go round.

A wheel has one spoke for each team and one ring for each member of a team; there is one wheel for each coordinate
along ``kv_team``. Ranks that share tokens and divide heads are neighbours on their spoke. Of a double ring, each inner
ring is a wheel, and these stand on a circle of their own. Positions come from the grid's coordinates, arrows from the
moves of the schedules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import asin, atan2, ceil, cos, hypot, pi, sin, sqrt
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Outline

from megatron_wallfacer.plots import GREY, INK
from megatron_wallfacer.plots.palette import Colour, hues, ink_on, ramp, tints
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.ops import Move, Schedule
from megatron_wallfacer.schedule.schemes import divisors

NODE = 0.5  # radius of a rank; all lengths are in its diameters
MEMBER_GAP = 1.16  # between the members of a team
HEADS_GAP = 1.42  # between members of a team that divide heads with others
SPOKE_GAP = 1.9  # between teams, where they are closest: leaves room for an arrow
TURN_GAP = 1.2  # between the inner rings of a double ring
WHEEL_GAP = 0.5
SMALLEST = 4.0  # side of the drawing: one rank alone must not fill the page

TEAM, HEADS, FRAME = "#d6dae1", "#f3dfb3", "#f4f5f7"
OUTER_RING = "#9aa3b2"
PERMUTATION: Mapping[str, Any] = {"color": "#4b5563", "lw": 0.9, "ls": (0, (4, 3)), "zorder": 2}

#: Above this cp size the chunks of a rank would not be read, and all the jumps of the permutation hide the rest.
CHUNKED = 16
READABLE = 4.5  # points
ARC_POINTS = 32

Point = tuple[float, float]


@dataclass(frozen=True)
class Wheels:
    """Where the ranks are.

    Attributes:
        rim: half the side of a wheel's frame.
        centres: of the wheels, by the coordinate along ``kv_team``.
        turn_rim: radius of an inner ring with all that belongs to it; 0 unless the ring is a double one.
        turns: by rank, what its ring turns around.
        places: of the ranks.
    """

    rim: float
    centres: tuple[Point, ...]
    turn_rim: float
    turns: tuple[Point, ...]
    places: tuple[Point, ...]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of everything."""
        xs, ys = zip(*self.centres, strict=True)
        margin = max(self.rim, SMALLEST / 2)
        return min(xs) - margin, max(xs) + margin, min(ys) - margin, max(ys) + margin


def is_double(grid: Grid) -> bool:
    """Whether there is an inner and an outer ring."""
    return grid.ring_inner > 1 and grid.ring_outer > 1


def turning_axis(grid: Grid) -> str:
    """The axis of the ring that turns at every visit: the inner one, or the only one."""
    return "ring_inner" if grid.ring_inner > 1 else "ring_outer"


def hops(schedule: Schedule, axis: str) -> tuple[Move, ...]:
    """The moves that take blocks along a ring."""
    return tuple(move for move in schedule.moves if move.channel == (axis, "inputs"))


def rings(schedules: Sequence[Schedule], axis: str) -> list[tuple[int, ...]]:
    """The ranks of each ring in the order of its hops; a rank that never hops is a ring of its own."""
    after = {schedule.rank: _next_rank(schedule, axis) for schedule in schedules}
    found: list[tuple[int, ...]] = []
    while after:
        ring, rank = [], min(after)
        while rank in after:
            ring.append(rank)
            rank = after.pop(rank)
        found.append(tuple(ring))
    return found


def both_ways(schedule: Schedule, axis: str) -> bool:
    """Whether blocks leave in two directions along a ring."""
    return len({message.peer for move in hops(schedule, axis) for message in move.sends}) > 1


def rank_colours(grid: Grid, schedules: Sequence[Schedule]) -> list[Colour]:
    """A colour for each rank: the hue of its ring, the tint of its place on it."""
    all_rings = rings(schedules, turning_axis(grid))
    colours: dict[int, Colour] = {}
    for hue, ring in zip(hues(len(all_rings)), all_rings, strict=True):
        # One ring alone has the whole range of colours to itself.
        shades = ramp(len(ring)) if len(all_rings) == 1 else tints(hue, len(ring))
        colours |= dict(zip(ring, shades, strict=True))
    return [colours[rank] for rank in range(len(schedules))]


def place(grid: Grid) -> Wheels:
    """Lay out the ranks of a grid."""
    size = grid.size_of(turning_axis(grid))
    cell, depth = _cell(grid) if size == 1 else _spoke(grid)
    hub = max(SPOKE_GAP / 2 / sin(pi / size), 1.15) if size > 1 else 0.0
    rim = (hub + depth + 0.36 if size > 1 else depth + 0.6) + NODE
    turn_rim, orbit = 0.0, 0.0
    if is_double(grid):
        turn_rim = rim
        orbit = (turn_rim + TURN_GAP / 2) / sin(pi / grid.ring_outer)
        rim = orbit + turn_rim
    columns = ceil(sqrt(grid.kv_team))
    pitch = 2 * rim + WHEEL_GAP
    centres = tuple((index % columns * pitch, -(index // columns) * pitch) for index in range(grid.kv_team))
    turns, places = [], []
    for rank in range(grid.cp_size):
        here = grid.coordinates(rank)
        turn = _beside(centres[here["kv_team"]], orbit, _angle(here["ring_outer"], grid.ring_outer))
        across, along = cell[here["team"] * grid.head + here["head"]]
        if size > 1:
            places.append(_beside(turn, hub + along, _angle(here[turning_axis(grid)], size)))
        else:
            places.append((turn[0] + across, turn[1] + along))
        turns.append(turn)
    return Wheels(rim, centres, turn_rim, tuple(turns), tuple(places))


def _angle(index: int, size: int) -> float:
    """Clockwise from the top."""
    return pi / 2 - 2 * pi * index / size


def _beside(centre: Point, radius: float, angle: float) -> Point:
    return centre[0] + radius * cos(angle), centre[1] + radius * sin(angle)


def _spoke(grid: Grid) -> tuple[list[Point], float]:
    """(the members of a team in line, across and along; its length): first member outside, heads next to each other."""
    member = MEMBER_GAP if grid.head == 1 else (grid.head - 1) * MEMBER_GAP + HEADS_GAP
    offsets = [team * member + head * MEMBER_GAP for team in range(grid.team) for head in range(grid.head)]
    return [(0.0, offsets[-1] - offset) for offset in offsets], offsets[-1]


def _cell(grid: Grid) -> tuple[list[Point], float]:
    """As a spoke, round the middle, for ranks without a ring; heads alone stand in rows."""
    if grid.team > 1:
        line, depth = _spoke(grid)
        return [(across, along - depth / 2) for across, along in line], depth / 2
    columns = next(size for size in divisors(grid.head) if size * size >= grid.head)
    rows = grid.head // columns
    places = [
        ((index % columns - (columns - 1) / 2) * MEMBER_GAP, ((rows - 1) / 2 - index // columns) * MEMBER_GAP)
        for index in range(grid.head)
    ]
    return places, (columns - 1) * MEMBER_GAP / 2


def gathered(schedule: Schedule, axis: str) -> tuple[str, ...]:
    """The tensors that are gathered along an axis, as in the bounds: q, k, v."""
    found = {tensor for move in schedule.moves if move.axis == axis for tensor in move.payload}
    return tuple(tensor for tensor in ("q", "k", "v") if tensor in found)


def kv_partners(schedule: Schedule) -> tuple[int, ...]:
    """The ranks with which this one shares keys and values along ``kv_team``; empty if it shares them with none."""
    moves = [move for move in schedule.moves if move.channel == ("kv_team", "inputs")]
    return tuple(
        sorted({message.peer for move in moves for message in move.receives} | {schedule.rank} if moves else ())
    )


def permutation(schedule: Schedule) -> int | None:
    """The rank to which a block jumps before the first visit: the published scheme's Algorithm 2."""
    jumps = (move for move in schedule.moves if move.channel == ("cp", "inputs"))
    return next((move.sends[0].peer for move in jumps), None)


def permutation_shown(grid: Grid) -> set[int]:
    """The ranks whose jump is drawn: all of them, or those of two teams where all would be a tangle."""
    teams = list(dict.fromkeys(grid.neighbours(rank, "team") for rank in range(grid.cp_size)))
    return {rank for team in (teams if grid.cp_size <= CHUNKED else teams[:2]) for rank in team}


def draw_wheels(axes: Axes, grid: Grid, schedules: Sequence[Schedule], colours: Sequence[Colour]) -> None:
    """Draw teams, ranks, rings and, where there is one, the permutation before the first visit."""
    wheels = place(grid)
    left, right, bottom, top = wheels.box
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    axes.axis("off")
    scale = _points_per_unit(axes, wheels)
    if len(wheels.centres) > 1:
        _frame(axes, wheels, scale)
    if is_double(grid):
        _outer_ring(axes, grid, wheels, schedules, scale)
    _groups(axes, grid, wheels, scale)
    for rank in sorted(permutation_shown(grid)):
        jump = permutation(schedules[rank])
        if jump is not None:
            _jump(axes, wheels.places[rank], wheels.places[jump], scale)
    for ring in rings(schedules, turning_axis(grid)):
        for rank, after in zip(ring, (*ring[1:], ring[0]), strict=True):
            if rank != after:
                _hop(
                    axes,
                    wheels,
                    rank,
                    after,
                    ring_colour(ring, colours),
                    scale,
                    both_ways(schedules[rank], turning_axis(grid)),
                )
    shares_kv = kv_partners(schedules[0])
    for rank, colour in enumerate(colours):
        _rank(axes, wheels.places[rank], rank, len(colours), colour, scale)
        if rank in shares_kv or rank == 0:
            _mark(axes, wheels.places[rank], scale, dotted=rank != 0)


def ring_colour(ring: Sequence[int], colours: Sequence[Colour]) -> Colour | str:
    """The hue of a ring; ink for the only one, whose ranks have every hue."""
    return INK if len(ring) == len(colours) else colours[ring[0]]


def _next_rank(schedule: Schedule, axis: str) -> int:
    moves = hops(schedule, axis)
    return moves[0].sends[0].peer if moves else schedule.rank


def _points_per_unit(axes: Axes, wheels: Wheels) -> float:
    """How large a unit of the drawing is on paper, so that lines and letters fit to it."""
    left, right, bottom, top = wheels.box
    room, (width, height) = axes.get_position(), axes.figure.get_size_inches()
    return 72 * min(room.width * width / (right - left), room.height * height / (top - bottom))


def _frame(axes: Axes, wheels: Wheels, scale: float) -> None:
    """A frame round each wheel, since there are several."""
    side = 2 * wheels.rim
    for index, (x, y) in enumerate(wheels.centres):
        corner = (x - wheels.rim, y - wheels.rim)
        style = f"round,pad=0,rounding_size={0.12 * wheels.rim + 0.1}"
        axes.add_patch(FancyBboxPatch(corner, side, side, boxstyle=style, fc=FRAME, ec="none", zorder=0))
        letters = min(9.0, 0.22 * scale)
        if letters > READABLE + 1.5:
            where = (corner[0] + 0.2, corner[1] + side - 0.18)
            axes.text(*where, f"kv_team {index}", ha="left", va="top", fontsize=letters, color=GREY)


def _groups(axes: Axes, grid: Grid, wheels: Wheels, scale: float) -> None:
    """Teams, and in them ranks that divide heads."""
    heads = [grid.neighbours(rank, "head") for rank in range(grid.cp_size) if grid.coordinates(rank)["head"] == 0]
    if grid.team > 1:
        width = 2 * NODE + (0.28 if grid.head == 1 else 0.46)
        for first in heads:
            if grid.coordinates(first[0])["team"] == 0:
                last = grid.neighbours(grid.neighbours(first[0], "team")[-1], "head")[-1]
                _capsule(axes, wheels.places[first[0]], wheels.places[last], width, TEAM, scale)
    for ranks in heads if grid.head > 1 else ():
        places = [wheels.places[rank] for rank in ranks]
        if grid.ring == grid.team == 1:
            _box(axes, places)
        else:
            _capsule(axes, places[0], places[-1], 2 * NODE + 0.26, HEADS, scale)


def _capsule(axes: Axes, first: Point, last: Point, width: float, colour: str, scale: float) -> None:
    """Round ranks in line."""
    xs, ys = zip(first, last, strict=True)
    axes.add_line(Line2D(xs, ys, lw=width * scale, color=colour, solid_capstyle="round", zorder=1))


def _box(axes: Axes, places: Sequence[Point]) -> None:
    """Round ranks in rows."""
    xs, ys = zip(*places, strict=True)
    corner, pad = (min(xs), min(ys)), NODE + 0.13
    style = f"round,pad={pad},rounding_size={pad}"
    axes.add_patch(
        FancyBboxPatch(corner, max(xs) - min(xs), max(ys) - min(ys), boxstyle=style, fc=HEADS, ec="none", zorder=1)
    )


def _outer_ring(axes: Axes, grid: Grid, wheels: Wheels, schedules: Sequence[Schedule], scale: float) -> None:
    """One broad arrow from inner ring to inner ring: each rank sends to the same place in the next one."""
    style = {"color": OUTER_RING, "lw": min(6.0, 0.16 * scale), "mutation_scale": min(26.0, 0.62 * scale)}
    for rank, schedule in enumerate(schedules):
        here = grid.coordinates(rank)
        if here["head"] or here["team"] or here["ring_inner"]:
            continue
        start, end = wheels.turns[rank], wheels.turns[_next_rank(schedule, "ring_outer")]
        axes.add_patch(Circle(start, wheels.turn_rim, fc="white", ec=OUTER_RING, lw=0.8, zorder=0.5))
        arc = _arc(wheels.centres[here["kv_team"]], start, end, wheels.turn_rim + 0.08)
        arrow = FancyArrowPatch(path=arc, arrowstyle="-|>", capstyle="butt", joinstyle="miter", zorder=0.8, **style)
        axes.add_patch(arrow)


def _hop(axes: Axes, wheels: Wheels, rank: int, after: int, colour: Colour | str, scale: float, back: bool) -> None:
    """An arrow along the circle, clockwise, from the edge of one rank to that of the next."""
    arc = _arc(wheels.turns[rank], wheels.places[rank], wheels.places[after], NODE + 0.05)
    head = min(14.0, 0.32 * scale)
    width = min(2.2, 0.05 * scale)
    arrow = "<|-|>" if back else "-|>"
    axes.add_patch(
        FancyArrowPatch(path=arc, arrowstyle=arrow, mutation_scale=head, color=colour, lw=width, fill=True, zorder=3)
    )


def _arc(centre: Point, start: Point, end: Point, gap: float) -> Outline:
    """A part of a circle, clockwise, that leaves a gap at both ends."""
    radius, first = _polar(centre, start)
    _, last = _polar(centre, end)
    cut = 2 * asin(gap / (2 * radius))
    sweep = (first - last) % (2 * pi) - 2 * cut
    angles = [first - cut - sweep * part / ARC_POINTS for part in range(ARC_POINTS + 1)]
    return Outline([_beside(centre, radius, angle) for angle in angles])


def _polar(centre: Point, place: Point) -> tuple[float, float]:
    x, y = place[0] - centre[0], place[1] - centre[1]
    return hypot(x, y), atan2(y, x)


def _jump(axes: Axes, start: Point, end: Point, scale: float) -> None:
    """A dashed arrow of the permutation; bent, so as not to hide behind the ranks in between."""
    near = hypot(end[0] - start[0], end[1] - start[1]) < 4.5
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            connectionstyle=f"arc3,rad={-0.5 if near else -0.2}",
            mutation_scale=min(11.0, 0.3 * scale),
            shrinkA=NODE * scale + 1.5,
            shrinkB=NODE * scale + 1.5,
            **PERMUTATION,
        )
    )


def _rank(axes: Axes, place: Point, rank: int, cp_size: int, colour: Colour, scale: float) -> None:
    axes.add_patch(Circle(place, NODE, fc=colour, ec="white", lw=1.2, zorder=4))
    ink, (x, y) = ink_on(colour), place
    centred = {"ha": "center", "va": "center_baseline", "color": ink, "zorder": 5}
    if cp_size > CHUNKED:
        if 0.42 * scale >= READABLE:
            axes.text(x, y, str(rank), fontsize=min(11.0, 0.42 * scale), **centred)
        return
    low, high = shard_chunks(rank, cp_size)
    axes.text(x, y + 0.13, str(rank), fontsize=min(17.0, 0.36 * scale), fontweight="bold", **centred)
    axes.text(x, y - 0.23, f"{low} · {high}", fontsize=min(9.5, 0.19 * scale), **centred)


def _mark(axes: Axes, place: Point, scale: float, *, dotted: bool) -> None:
    """An outline: rank 0, or who shares keys and values with it."""
    width = min(2.4, 0.08 * scale)
    radius, line = (NODE + 0.07, (0, (1, 1.2))) if dotted else (NODE, "-")
    axes.add_patch(Circle(place, radius, fc="none", ec=INK, lw=width, ls=line, zorder=6))
