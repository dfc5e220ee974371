"""Draw the ranks of a grid with their teams, their rings, and the transfers before the first ring step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import asin, atan2, hypot, pi
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Outline

from megatron_wallfacer.plots import GREY, INK
from megatron_wallfacer.plots.grid_layout import RADIUS, GridLayout, Position, layout_of, on_circle
from megatron_wallfacer.plots.grid_rings import (
    MAX_WITH_CHUNKS,
    is_bidirectional,
    is_double,
    kv_team_of,
    next_rank,
    permutation_shown,
    permutation_target,
    rings,
    step_axis,
)
from megatron_wallfacer.plots.palette import Colour, text_colour_on
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.ops import Schedule

TEAM, HEADS, FRAME = "#d6dae1", "#f3dfb3", "#f4f5f7"
OUTER_RING = "#9aa3b2"
PERMUTATION: Mapping[str, Any] = {"color": "#374151", "lw": 1.3, "ls": (0, (4, 3)), "zorder": 2}
READABLE = 4.5  # smallest text, in points
ARC_POINTS = 32


def draw_ranks(axes: Axes, grid: Grid, schedules: Sequence[Schedule], colours: Sequence[Colour]) -> None:
    """Draw teams, ranks, rings and the permutation that precedes the first ring step."""
    layout = layout_of(grid)
    left, right, bottom, top = layout.box
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    axes.axis("off")
    scale = _points_per_unit(axes, layout)
    if len(layout.centres) > 1:
        _frames(axes, layout, scale)
    if is_double(grid):
        _outer_ring(axes, grid, layout, schedules, scale)
    _teams(axes, grid, layout, scale)
    for rank in sorted(permutation_shown(grid)):
        target = permutation_target(schedules[rank])
        if target is not None:
            _permutation_arrow(axes, layout.positions[rank], layout.positions[target], scale)
    axis = step_axis(grid)
    for ring in rings(schedules, axis):
        # A single ring contains all colours.
        colour = INK if len(ring) == len(colours) else colours[ring[0]]
        for ranks in zip(ring, (*ring[1:], ring[0]), strict=True):
            if len(ring) > 1:
                _hop(axes, layout, ranks, colour, scale, both_ways=is_bidirectional(schedules[ranks[0]], axis))
    kv_team = kv_team_of(schedules[0])
    for rank, colour in enumerate(colours):
        _rank(axes, layout.positions[rank], rank, len(colours), colour, scale)
        if rank in kv_team or rank == 0:
            _mark(axes, layout.positions[rank], scale, dotted=rank != 0)


def _points_per_unit(axes: Axes, layout: GridLayout) -> float:
    left, right, bottom, top = layout.box
    panel, (width, height) = axes.get_position(), axes.figure.get_size_inches()
    return 72 * min(panel.width * width / (right - left), panel.height * height / (top - bottom))


def _frames(axes: Axes, layout: GridLayout, scale: float) -> None:
    side = 2 * layout.half_side
    for index, (x, y) in enumerate(layout.centres):
        corner = (x - layout.half_side, y - layout.half_side)
        style = f"round,pad=0,rounding_size={0.12 * layout.half_side + 0.1}"
        axes.add_patch(FancyBboxPatch(corner, side, side, boxstyle=style, fc=FRAME, ec="none", zorder=0))
        font_size = min(9.0, 0.22 * scale)
        if font_size > READABLE + 1.5:
            position = (corner[0] + 0.2, corner[1] + side - 0.18)
            axes.text(*position, f"kv_team {index}", ha="left", va="top", fontsize=font_size, color=GREY)


def _teams(axes: Axes, grid: Grid, layout: GridLayout, scale: float) -> None:
    """Draw a background behind each team, and behind ranks that divide heads."""
    heads = [grid.neighbours(rank, "head") for rank in range(grid.cp_size) if grid.coordinates(rank)["head"] == 0]
    if grid.team > 1:
        width = 2 * RADIUS + (0.28 if grid.head == 1 else 0.46)
        for first in heads:
            if grid.coordinates(first[0])["team"] == 0:
                last = grid.neighbours(grid.neighbours(first[0], "team")[-1], "head")[-1]
                _capsule(axes, layout.positions[first[0]], layout.positions[last], width, TEAM, scale)
    for ranks in heads if grid.head > 1 else ():
        positions = [layout.positions[rank] for rank in ranks]
        if grid.ring == grid.team == 1:
            _box(axes, positions)
        else:
            _capsule(axes, positions[0], positions[-1], 2 * RADIUS + 0.26, HEADS, scale)


def _capsule(axes: Axes, first: Position, last: Position, width: float, colour: str, scale: float) -> None:
    xs, ys = zip(first, last, strict=True)
    axes.add_line(Line2D(xs, ys, lw=width * scale, color=colour, solid_capstyle="round", zorder=1))


def _box(axes: Axes, positions: Sequence[Position]) -> None:
    xs, ys = zip(*positions, strict=True)
    corner, pad = (min(xs), min(ys)), RADIUS + 0.13
    style = f"round,pad={pad},rounding_size={pad}"
    axes.add_patch(
        FancyBboxPatch(corner, max(xs) - min(xs), max(ys) - min(ys), boxstyle=style, fc=HEADS, ec="none", zorder=1)
    )


def _outer_ring(axes: Axes, grid: Grid, layout: GridLayout, schedules: Sequence[Schedule], scale: float) -> None:
    """Draw one thick arrow from each inner ring to the next. All ranks of an inner ring send to the next inner ring."""
    style = {"color": OUTER_RING, "lw": min(6.0, 0.16 * scale), "mutation_scale": min(26.0, 0.62 * scale)}
    for rank, schedule in enumerate(schedules):
        coordinates = grid.coordinates(rank)
        if coordinates["head"] or coordinates["team"] or coordinates["ring_inner"]:
            continue
        start, end = layout.ring_centres[rank], layout.ring_centres[next_rank(schedule, "ring_outer")]
        axes.add_patch(Circle(start, layout.inner_radius, fc="white", ec=OUTER_RING, lw=0.8, zorder=0.5))
        arc = _arc(layout.centres[coordinates["kv_team"]], start, end, layout.inner_radius + 0.08)
        arrow = FancyArrowPatch(path=arc, arrowstyle="-|>", capstyle="butt", joinstyle="miter", zorder=0.8, **style)
        axes.add_patch(arrow)


def _hop(
    axes: Axes, layout: GridLayout, ranks: tuple[int, int], colour: Colour | str, scale: float, *, both_ways: bool
) -> None:
    """Draw an arrow along the circle, clockwise from a rank to the next rank."""
    rank, following = ranks
    arc = _arc(layout.ring_centres[rank], layout.positions[rank], layout.positions[following], RADIUS + 0.05)
    style = {"arrowstyle": "<|-|>" if both_ways else "-|>", "mutation_scale": min(14.0, 0.32 * scale)}
    axes.add_patch(FancyArrowPatch(path=arc, color=colour, lw=min(2.2, 0.05 * scale), fill=True, zorder=3, **style))


def _arc(centre: Position, start: Position, end: Position, gap: float) -> Outline:
    """Return a clockwise arc of a circle with a gap at both ends."""
    radius, first = _polar(centre, start)
    _, last = _polar(centre, end)
    cut = 2 * asin(gap / (2 * radius))
    sweep = (first - last) % (2 * pi) - 2 * cut
    angles = [first - cut - sweep * part / ARC_POINTS for part in range(ARC_POINTS + 1)]
    return Outline([on_circle(centre, radius, angle) for angle in angles])


def _polar(centre: Position, position: Position) -> tuple[float, float]:
    x, y = position[0] - centre[0], position[1] - centre[1]
    return hypot(x, y), atan2(y, x)


def _permutation_arrow(axes: Axes, start: Position, end: Position, scale: float) -> None:
    """Draw a dashed arrow that bends around the ranks between its ends."""
    is_short = hypot(end[0] - start[0], end[1] - start[1]) < 4.5
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            connectionstyle=f"arc3,rad={0.55 if is_short else -0.2}",
            mutation_scale=min(13.0, 0.34 * scale),
            shrinkA=RADIUS * scale + 1.5,
            shrinkB=RADIUS * scale + 1.5,
            **PERMUTATION,
        )
    )


def _rank(axes: Axes, position: Position, rank: int, cp_size: int, colour: Colour, scale: float) -> None:
    axes.add_patch(Circle(position, RADIUS, fc=colour, ec="white", lw=1.2, zorder=4))
    text_colour, (x, y) = text_colour_on(colour), position
    centred = {"ha": "center", "va": "center_baseline", "color": text_colour, "zorder": 5}
    if cp_size > MAX_WITH_CHUNKS:
        if 0.42 * scale >= READABLE:
            axes.text(x, y, str(rank), fontsize=min(11.0, 0.42 * scale), **centred)
        return
    low, high = shard_chunks(rank, cp_size)
    axes.text(x, y + 0.13, str(rank), fontsize=min(17.0, 0.36 * scale), fontweight="bold", **centred)
    axes.text(x, y - 0.23, f"{low} · {high}", fontsize=min(9.5, 0.19 * scale), **centred)


def _mark(axes: Axes, position: Position, scale: float, *, dotted: bool) -> None:
    """Draw the outline of rank 0, or the dotted outline of a rank that shares keys and values with rank 0."""
    width = min(2.4, 0.08 * scale)
    radius, line = (RADIUS + 0.07, (0, (1, 1.2))) if dotted else (RADIUS, "-")
    axes.add_patch(Circle(position, radius, fc="none", ec=INK, lw=width, ls=line, zorder=6))
