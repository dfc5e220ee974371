"""The picture of a grid: who shares what and which ring turns where, and the square that it covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from megatron_wallfacer.plots import GREY, INK, new_figure, save
from megatron_wallfacer.plots import grid_drawing as wheels
from megatron_wallfacer.plots.shard_pairs import Pair, Work, draw_square, is_numbered, square_of
from megatron_wallfacer.schedule import bounds
from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.grid import AXES, Grid
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape, words

TIMES = "\N{MULTIPLICATION SIGN}"
WIDTH, HEIGHT = 13.0, 8.2  # inches
LEFT, RIGHT = 0.035, 0.575  # where the two columns begin, in parts of the width
TOP, BOTTOM, NOTES = 0.81, 0.18, 0.145  # of the panels, and the top of what is written below, in parts of the height
TITLE = 62  # letters of the title for which there is room in its usual size
NOTE = 10.0  # points of a letter below the panels
NOTE_GAP = 0.75  # between lines there, in letters, where there are few of them
RIDING = ("q", "dout", "k", "v", "dq", "dk", "dv")
"""The order in which riders are named; statistics are not."""


def draw_grid(plan: Plan, path: Path) -> None:
    """Draw a plan as PNG: on the left who shares what, on the right who computes what.

    Both panels, and the words in the title, are read off the schedules that the engine runs.

    Args:
        plan: what to draw.
        path: the file to write; its folder is made.
    """
    schedules = [forward_schedule(plan, rank) for rank in range(plan.grid.cp_size)]
    backward = backward_schedule(plan, busiest_rank(plan))
    colours = wheels.rank_colours(plan.grid, schedules)
    square = square_of(plan)
    figure = new_figure(WIDTH, HEIGHT)
    title = _title(plan)
    size = min(19.0, 19.0 * TITLE / len(title))
    figure.text(LEFT, 0.94, title, fontsize=size, fontweight="bold", color=INK, va="center")
    told = _words(plan, schedules[busiest_rank(plan)], backward)
    figure.text(LEFT, 0.891, told, fontsize=11, color=GREY, va="center")
    wheels.draw_wheels(figure.add_axes((LEFT, BOTTOM, 0.475, TOP - BOTTOM)), plan.grid, schedules, colours)
    side = (TOP - BOTTOM) * HEIGHT / WIDTH
    draw_square(figure.add_axes((RIGHT, BOTTOM, side, TOP - BOTTOM)), square, colours)
    _notes(figure, LEFT, _signs(plan, schedules, backward), handlelength=2.2)
    _notes(figure, RIGHT, [(Line2D([], [], ls="none"), line) for line in _captions(plan, square)])
    save(figure, path)


def _axis_name(grid: Grid, axis: str) -> str:
    """A ring alone is neither inner nor outer."""
    return axis if wheels.is_double(grid) else axis.replace("ring_outer", "ring").replace("ring_inner", "ring")


def _title(plan: Plan) -> str:
    grid = plan.grid
    axes = f" {TIMES} ".join(
        f"{_axis_name(grid, axis)} {grid.size_of(axis)}" for axis in AXES if grid.size_of(axis) > 1
    )
    return f"{plan.scheme}  ·  cp size {grid.cp_size}" + (f" = {axes}" if axes else "")


def _words(plan: Plan, forward: Schedule, backward: Schedule) -> str:
    """The words that the busiest rank receives."""
    grid = plan.grid
    # One word a shard of queries, and as many kv heads as q heads: the units of the bounds.
    shape = Shape(tokens=1, q_heads=grid.head, kv_heads=grid.head, head_dim=1)
    limit, units = "the lower bound", "in units of n·H, kv heads = q heads"
    if grid.head > 1:
        limit, units = "bound", f"{units}, bound for undivided heads"
    told = []
    for name, schedule, bound in (
        ("forward", forward, bounds.forward_bound(grid.cp_size, shape.kappa)),
        ("backward", backward, bounds.backward_bound(grid.cp_size, shape.kappa)),
    ):
        received = words(schedule, shape) / shape.unit
        told.append(f"{name} {received:g} ({bounds.ratio(received, bound):.2f} {TIMES} {limit})")
    return f"Words received by a rank:  {',  '.join(told)};  {units}"


def _signs(plan: Plan, schedules: Sequence[Schedule], backward: Schedule) -> list[tuple[Artist, str]]:
    """What the signs of the left panel mean; only those that are there."""
    grid = plan.grid
    signs: list[tuple[Artist, str]] = []
    disc = {"ls": "none", "marker": "o", "ms": 11, "mfc": "white", "mec": INK, "mew": 1.6}
    if grid.cp_size <= wheels.CHUNKED:
        cut = f"rank, and which 2 of the {2 * grid.cp_size} chunks of the sequence it holds (zig-zag)"
        signs.append((Line2D([], [], **disc), cut))
    if grid.head > 1:
        signs.append(
            (Patch(color=wheels.HEADS), f"head: all have each other's tokens, each 1/{grid.head} of the heads")
        )
    if grid.team > 1:
        shared = ", ".join(tensor.upper() for tensor in wheels.gathered(schedules[0], "team"))
        combines = any(move.channel == ("team", "results") for move in schedules[0].moves)
        results = "; combines partial outputs" if combines else ""
        signs.append((Patch(color=wheels.TEAM), f"team: gathers {shared}{results}"))
    signs += _ring_signs(plan, schedules, backward)
    jumps = [schedule.rank for schedule in schedules if wheels.permutation(schedule) is not None]
    if jumps:
        shown = "" if set(jumps) <= wheels.permutation_shown(grid) else ", shown for two teams"
        dashes = Line2D([], [], **{name: wheels.PERMUTATION[name] for name in ("color", "lw", "ls")})
        what = "Q" if plan.forward == "q" else "K and V"
        whose = "of the team" if plan.kv_order == "paper" else "of the rank"
        signs.append((dashes, f"before the first visit: {what} {whose} go there (Algorithm 2{shown})"))
    if wheels.kv_partners(schedules[0]):
        dots = Line2D([], [], color=INK, lw=1.6, ls=":")
        shared = ", ".join(tensor.upper() for tensor in wheels.gathered(schedules[0], "kv_team"))
        signs.append((dots, f"kv_team: gathers {shared}; dotted outline: shares them with rank 0"))
    return signs


def _ring_signs(plan: Plan, schedules: Sequence[Schedule], backward: Schedule) -> list[tuple[Artist, str]]:
    grid, axis = plan.grid, wheels.turning_axis(plan.grid)
    rings = wheels.rings(schedules, axis)
    if len(rings[0]) == 1:
        return []
    arrow = Line2D([], [], lw=2.2, color=INK, marker=">", markevery=[1], ms=6)
    kind = "inner ring" if wheels.is_double(grid) else "ring"
    many = f"{len(rings)} {kind}s" if len(rings) > 1 else kind
    way = "half way round in each direction" if plan.bidirectional else "hops while a visit computes"
    text = f"{many} of {len(rings[0])}, {way}: {_riding(schedules[0], axis)}; in backward {_riding(backward, axis)}"
    signs: list[tuple[Artist, str]] = [(arrow, text)]
    if wheels.is_double(grid):
        broad = Line2D([], [], lw=4.5, color=wheels.OUTER_RING, marker=">", markevery=[1], ms=9)
        signs.append((broad, f"outer ring of {grid.ring_outer}: hops while the inner ring makes a turn"))
    return signs


def _riding(schedule: Schedule, axis: str) -> str:
    """The tensors that go along a ring, results among them."""
    found = {tensor for move in schedule.moves if move.axis == axis for tensor in move.payload}
    names = {"dout": "dO", "dq": "dQ", "dk": "dK", "dv": "dV"}
    return ", ".join(names.get(tensor, tensor.upper()) for tensor in RIDING if tensor in found)


def _captions(plan: Plan, square: Mapping[Pair, Sequence[Work]]) -> list[str]:
    """What the right panel shows."""
    grid = plan.grid
    mine = sum(work.rank == 0 for works in square.values() for work in works)
    number = ", number: the visit of the ring" if is_numbered(square, grid.cp_size) else ""
    stripe = f"; each stripe 1/{grid.head} of the heads" if grid.head > 1 else ""
    captions = [
        f"Colour: the rank that computes the pair{number}",
        f"Outline: rank 0, {mine} of the {len(square)} pairs{stripe}",
    ]
    if len({work.area for works in square.values() for work in works}) == 1:
        captions.append("Each pair once; each costs the same, causal mask and all")
    axes = [_axis_name(grid, axis) for axis in grid.placement]
    if len(axes) == 2:
        captions.append(f"Ranks next to each other: along {axes[0]}, then {axes[1]}")
    elif len(axes) > 2:
        captions.append(f"Axes, nearest ranks first: {', '.join(axes)}")
    if plan.head_groups > 1:
        captions.append(f"Heads go through in {plan.head_groups} groups, one moves while another computes")
    return captions


def _notes(figure: Figure, left: float, notes: Sequence[tuple[Artist, str]], handlelength: float = 0) -> None:
    """Lines below a panel, each with its sign; the same grid of lines below both."""
    if not notes:
        return
    signs, lines = zip(*notes, strict=True)
    room = NOTES * HEIGHT * 72 / NOTE / len(lines) - 1.3  # letters between lines that there is room for
    figure.legend(
        signs,
        lines,
        loc="upper left",
        bbox_to_anchor=(left, NOTES),
        borderaxespad=0,
        borderpad=0,
        frameon=False,
        fontsize=NOTE,
        labelcolor=INK,
        labelspacing=min(NOTE_GAP, room),
        handlelength=handlelength,
        handletextpad=1.0 if handlelength else 0,
    )
