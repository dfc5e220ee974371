"""The picture of a grid: who shares what and which ring turns where, and the square that it covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from megatron_wallfacer.cli.pictures import GREY, INK, new_figure, save, wheels
from megatron_wallfacer.cli.pictures.square import NUMBERED, Pair, Work, draw_square, square_of
from megatron_wallfacer.schedule import bounds
from megatron_wallfacer.schedule.grid import AXES
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import Schedule, backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape, words

#: A shard of queries is one word, and there are as many kv heads as q heads: the units of the bounds.
UNIT = Shape(tokens=1, q_heads=1, kv_heads=1, head_dim=1)

TIMES = "\N{MULTIPLICATION SIGN}"
WIDTH, HEIGHT = 13.0, 8.2  # inches
LEFT, RIGHT = 0.035, 0.575  # where the two columns begin, in parts of the width
TOP, BOTTOM, NOTES = 0.81, 0.18, 0.145  # of the panels, and the top of what is written below, in parts of the height


def draw_grid(plan: Plan, path: Path) -> None:
    """Draw a plan as PNG: on the left who shares what, on the right who computes what.

    Both panels, and the words in the title, are read off the schedules that the engine runs.

    Args:
        plan: what to draw.
        path: the file to write; its folder is made.
    """
    schedules = [forward_schedule(plan, rank) for rank in range(plan.grid.cp_size)]
    colours = wheels.rank_colours(schedules)
    square = square_of(plan)
    figure = new_figure(WIDTH, HEIGHT)
    figure.text(LEFT, 0.94, _title(plan), fontsize=19, fontweight="bold", color=INK, va="center")
    figure.text(LEFT, 0.891, _words(plan, schedules), fontsize=11, color=GREY, va="center")
    wheels.draw_wheels(figure.add_axes((LEFT, BOTTOM, 0.475, TOP - BOTTOM)), plan.grid, schedules, colours)
    side = (TOP - BOTTOM) * HEIGHT / WIDTH
    draw_square(figure.add_axes((RIGHT, BOTTOM, side, TOP - BOTTOM)), square, colours)
    _notes(figure, LEFT, _signs(plan, schedules), handlelength=2.2)
    _notes(figure, RIGHT, [(Line2D([], [], ls="none"), line) for line in _captions(plan, square)])
    save(figure, path)


def _title(plan: Plan) -> str:
    axes = f" {TIMES} ".join(f"{axis} {plan.grid.size_of(axis)}" for axis in AXES if plan.grid.size_of(axis) > 1)
    return f"{plan.scheme}  ·  cp size {plan.grid.cp_size}" + (f" = {axes}" if axes else "")


def _words(plan: Plan, forward: Sequence[Schedule]) -> str:
    """The words that the busiest rank receives; a hop to itself saves some ranks a few."""
    size = plan.grid.cp_size
    backward = [backward_schedule(plan, rank) for rank in range(size)]
    told = []
    for name, schedules, bound in (
        ("forward", forward, bounds.forward_bound(size, UNIT.kappa)),
        ("backward", backward, bounds.backward_bound(size, UNIT.kappa)),
    ):
        most = max(words(schedule, UNIT) for schedule in schedules) / UNIT.unit
        told.append(f"{name} {most:g} ({bounds.ratio(most, bound):.2f} {TIMES} the lower bound)")
    return f"Words received by a rank:  {',  '.join(told)};  in units of n·H, kv heads = q heads"


def _signs(plan: Plan, schedules: Sequence[Schedule]) -> list[tuple[Artist, str]]:
    """What the signs of the left panel mean; only those that are there."""
    grid = plan.grid
    signs: list[tuple[Artist, str]] = []
    disc = {"ls": "none", "marker": "o", "ms": 11, "mfc": "white", "mec": INK, "mew": 1.6}
    if grid.cp_size <= wheels.CHUNKED:
        cut = f"rank, and which 2 of the {2 * grid.cp_size} chunks of the sequence it holds (zig-zag)"
        signs.append((Line2D([], [], **disc), cut))
    if len(schedules[0].steps[0].q_ranks) > 1:
        gathered = {tensor for move in schedules[0].prologue if move.axis == "team" for tensor in move.payload}
        shared = ", ".join(tensor.upper() for tensor in ("q", "k", "v") if tensor in gathered)
        signs.append((Patch(color=wheels.TEAM), f"team: gathers {shared}; combines partial outputs"))
    rings = wheels.rings(schedules)
    if len(rings[0]) > 1:
        arrow = Line2D([], [], lw=2.2, color=INK, marker=">", markevery=[1], ms=6)
        many = f"{len(rings)} rings" if len(rings) > 1 else "ring"
        signs.append((arrow, f"{many} of {len(rings[0])}: K and V hop to the next rank while a step computes"))
    jumps = [schedule.rank for schedule in schedules if wheels.permutation(schedule)]
    if jumps:
        shown = "" if set(jumps) <= wheels.permutation_shown(schedules) else ", shown for two teams"
        dashes = Line2D([], [], **{name: wheels.PERMUTATION[name] for name in ("color", "lw", "ls")})
        signs.append((dashes, f"before the first step: K and V of the team go there (Algorithm 2{shown})"))
    if wheels.kv_partners(schedules[0]):
        dots = Line2D([], [], color=INK, lw=1.6, ls=":")
        signs.append((dots, "kv_team: gathers K, V; dotted outline: shares them with rank 0"))
    return signs


def _captions(plan: Plan, square: Mapping[Pair, Work]) -> list[str]:
    """What the right panel shows."""
    mine = sum(work.rank == 0 for work in square.values())
    number = ", number: the ring step" if plan.grid.cp_size <= NUMBERED else ""
    captions = [
        f"Colour: the rank that computes the pair{number}",
        f"Outline: rank 0, {mine} of the {len(square)} pairs",
    ]
    if len({work.area for work in square.values()}) == 1:
        captions.append("Each pair once; each costs the same, causal mask and all")
    axes = [axis for axis in plan.grid.placement if plan.grid.size_of(axis) > 1]
    if len(axes) > 1:
        captions.append(f"Ranks next to each other: along {', then '.join(axes)}")
    return captions


def _notes(figure: Figure, left: float, notes: Sequence[tuple[Artist, str]], handlelength: float = 0) -> None:
    """Lines below a panel, each with its sign; the same grid of lines below both."""
    if not notes:
        return
    signs, lines = zip(*notes, strict=True)
    figure.legend(
        signs,
        lines,
        loc="upper left",
        bbox_to_anchor=(left, NOTES),
        borderaxespad=0,
        borderpad=0,
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        labelspacing=0.75,
        handlelength=handlelength,
        handletextpad=1.0 if handlelength else 0,
    )
