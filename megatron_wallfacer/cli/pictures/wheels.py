"""The ranks as wheels: teams are spokes, rings go round.

A wheel has one spoke for each team and one ring for each member of a team; there is one wheel for each coordinate
along ``kv_team``. Positions come from the grid's coordinates, arrows from the hops of the schedules.
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

from megatron_wallfacer.cli.pictures import GREY, INK
from megatron_wallfacer.cli.pictures.palette import Colour, hues, ink_on, ramp, tints
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.moves import Gather, Hop
from megatron_wallfacer.schedule.schedule import Schedule

NODE = 0.5  # radius of a rank; all lengths are in its diameters
MEMBER_GAP = 1.16  # between the members of a team
SPOKE_GAP = 1.9  # between teams, where they are closest: leaves room for an arrow
WHEEL_GAP = 0.5
SMALLEST = 4.0  # side of the drawing: one rank alone must not fill the page

TEAM, FRAME = "#d6dae1", "#f4f5f7"
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
        places: of the ranks.
    """

    rim: float
    centres: tuple[Point, ...]
    places: tuple[Point, ...]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of everything."""
        xs, ys = zip(*self.centres, strict=True)
        margin = max(self.rim, SMALLEST / 2)
        return min(xs) - margin, max(xs) + margin, min(ys) - margin, max(ys) + margin


def rings(schedules: Sequence[Schedule]) -> list[tuple[int, ...]]:
    """The ranks of each ring in the order of its hops; a rank that never hops is a ring of its own."""
    after = {schedule.rank: _next_rank(schedule) for schedule in schedules}
    found: list[tuple[int, ...]] = []
    while after:
        ring, rank = [], min(after)
        while rank in after:
            ring.append(rank)
            rank = after.pop(rank)
        found.append(tuple(ring))
    return found


def rank_colours(schedules: Sequence[Schedule]) -> list[Colour]:
    """A colour for each rank: the hue of its ring, the tint of its place on it."""
    all_rings = rings(schedules)
    colours: dict[int, Colour] = {}
    for hue, ring in zip(hues(len(all_rings)), all_rings, strict=True):
        # One ring alone has the whole range of colours to itself.
        shades = ramp(len(ring)) if len(all_rings) == 1 else tints(hue, len(ring))
        colours |= dict(zip(ring, shades, strict=True))
    return [colours[rank] for rank in range(len(schedules))]


def place(grid: Grid) -> Wheels:
    """Lay out the ranks of a grid."""
    hub = max(SPOKE_GAP / 2 / sin(pi / grid.ring), 1.15) if grid.ring > 1 else 0.0
    depth = (grid.team - 1) * MEMBER_GAP
    # A team alone stands upright in the middle of its wheel.
    rim = (hub + depth + 0.36 if grid.ring > 1 else depth / 2 + 0.6) + NODE
    columns = ceil(sqrt(grid.kv_team))
    pitch = 2 * rim + WHEEL_GAP
    centres = tuple((index % columns * pitch, -(index // columns) * pitch) for index in range(grid.kv_team))
    places = []
    for rank in range(grid.cp_size):
        here = grid.coordinates(rank)
        x, y = centres[here["kv_team"]]
        # Clockwise from the top, first member outside.
        angle = pi / 2 - 2 * pi * here["ring"] / grid.ring
        radius = (hub if grid.ring > 1 else -depth / 2) + (grid.team - 1 - here["team"]) * MEMBER_GAP
        places.append((x + radius * cos(angle), y + radius * sin(angle)))
    return Wheels(rim, centres, tuple(places))


def kv_partners(schedule: Schedule) -> tuple[int, ...]:
    """The ranks with which this one shares keys and values along ``kv_team``; empty if it shares them with none."""
    found = [move.ranks for move in schedule.prologue if isinstance(move, Gather) and move.axis == "kv_team"]
    return found[0] if found else ()


def permutation(schedule: Schedule) -> Hop | None:
    """The hop before the first step: the published scheme's Algorithm 2."""
    return next((move for move in schedule.prologue if isinstance(move, Hop)), None)


def permutation_shown(schedules: Sequence[Schedule]) -> set[int]:
    """The ranks whose jump is drawn: all of them, or those of two teams where all would be a tangle."""
    teams = list(dict.fromkeys(schedule.steps[0].q_ranks for schedule in schedules))
    return {rank for team in (teams if len(schedules) <= CHUNKED else teams[:2]) for rank in team}


def draw_wheels(axes: Axes, grid: Grid, schedules: Sequence[Schedule], colours: Sequence[Colour]) -> None:
    """Draw teams, ranks, rings and, where there is one, the permutation before the first step."""
    wheels = place(grid)
    left, right, bottom, top = wheels.box
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    axes.axis("off")
    scale = _points_per_unit(axes, wheels)
    if len(wheels.centres) > 1:
        _frame(axes, wheels, scale)
    for team in dict.fromkeys(schedule.steps[0].q_ranks for schedule in schedules):
        if len(team) > 1:
            _team(axes, [wheels.places[rank] for rank in team], scale)
    for rank in permutation_shown(schedules):
        jump = permutation(schedules[rank])
        if jump is not None:
            _jump(axes, wheels.places[rank], wheels.places[jump.send_to], scale)
    for ring in rings(schedules):
        centre = wheels.centres[grid.coordinates(ring[0])["kv_team"]]
        for rank, after in zip(ring, (*ring[1:], ring[0]), strict=True):
            if rank != after:
                _hop(axes, centre, wheels.places[rank], wheels.places[after], ring_colour(ring, colours), scale)
    shares_kv = kv_partners(schedules[0])
    for rank, colour in enumerate(colours):
        _rank(axes, wheels.places[rank], rank, len(colours), colour, scale)
        if rank in shares_kv or rank == 0:
            _mark(axes, wheels.places[rank], scale, dotted=rank != 0)


def ring_colour(ring: Sequence[int], colours: Sequence[Colour]) -> Colour | str:
    """The hue of a ring; ink for the only one, whose ranks have every hue."""
    return INK if len(ring) == len(colours) else colours[ring[0]]


def _next_rank(schedule: Schedule) -> int:
    hop = schedule.steps[0].hop
    return schedule.rank if hop is None else hop.send_to


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


def _team(axes: Axes, places: Sequence[Point], scale: float) -> None:
    xs, ys = zip(*places, strict=True)
    axes.add_line(Line2D(xs, ys, lw=(2 * NODE + 0.28) * scale, color=TEAM, solid_capstyle="round", zorder=1))


def _hop(axes: Axes, centre: Point, start: Point, end: Point, colour: Colour | str, scale: float) -> None:
    """An arrow along the circle, clockwise, from the edge of one rank to that of the next."""
    radius, first = _polar(centre, start)
    _, last = _polar(centre, end)
    cut = 2 * asin((NODE + 0.05) / (2 * radius))
    sweep = (first - last) % (2 * pi) - 2 * cut
    angles = [first - cut - sweep * part / ARC_POINTS for part in range(ARC_POINTS + 1)]
    arc = Outline([(centre[0] + radius * cos(angle), centre[1] + radius * sin(angle)) for angle in angles])
    head = min(14.0, 0.32 * scale)
    width = min(2.2, 0.05 * scale)
    axes.add_patch(
        FancyArrowPatch(path=arc, arrowstyle="-|>", mutation_scale=head, color=colour, lw=width, fill=True, zorder=3)
    )


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
