"""Plot a grid: its teams, its rings, and the rank that computes each pair of shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from megatron_wallfacer.plots import GREY, INK, grid_drawing, grid_rings, new_figure, save
from megatron_wallfacer.plots.shard_pairs import Pair, PairWork, draw_pairs, has_numbers, pairs_of
from megatron_wallfacer.schedule import volume_bounds
from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.grid import AXES, Grid
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape, received_elements

TIMES = "\N{MULTIPLICATION SIGN}"
WIDTH, HEIGHT = 13.0, 8.2  # inches
LEFT, RIGHT = 0.035, 0.575  # left edges of the two panels, as fractions of the width
TOP, BOTTOM, LEGEND = 0.81, 0.18, 0.145  # edges of the panels and top of the legends, as fractions of the height
TITLE_LENGTH = 62  # characters of a title in full size
LEGEND_POINTS = 10.0  # font size of the legends
MAX_LINE_GAP = 0.75  # largest gap between lines of a legend, in font sizes
TENSOR_ORDER = ("q", "dout", "k", "v", "dq", "dk", "dv")
"""Tensors that a ring can transfer, in the order of the legend, without lse and delta."""

LegendEntry = tuple[Artist, str]


def draw_grid(plan: Plan, path: Path) -> None:
    """Draw a plan as PNG or SVG: teams and rings in the left panel, computed pairs in the right panel.

    All panels, and the communication volume in the title, show the schedules that the engine runs.
    """
    schedules = [forward_schedule(plan, rank) for rank in range(plan.grid.cp_size)]
    backward = backward_schedule(plan, busiest_rank(plan))
    colours = grid_rings.rank_colours(plan.grid, schedules)
    pairs = pairs_of(plan)
    figure = new_figure(WIDTH, HEIGHT)
    title = _title(plan)
    size = min(19.0, 19.0 * TITLE_LENGTH / len(title))
    figure.text(LEFT, 0.94, title, fontsize=size, fontweight="bold", color=INK, va="center")
    volume = _volume(plan, schedules[busiest_rank(plan)], backward)
    figure.text(LEFT, 0.891, volume, fontsize=11, color=GREY, va="center")
    left = figure.add_axes((LEFT, BOTTOM, 0.475, TOP - BOTTOM))
    grid_drawing.draw_ranks(left, plan.grid, schedules, colours)
    side = (TOP - BOTTOM) * HEIGHT / WIDTH
    draw_pairs(figure.add_axes((RIGHT, BOTTOM, side, TOP - BOTTOM)), pairs, colours)
    _legend(figure, LEFT, _left_legend(plan, schedules, backward), handlelength=2.2)
    _legend(figure, RIGHT, [(Line2D([], [], ls="none"), line) for line in _right_legend(plan, pairs)])
    save(figure, path)


def _axis_name(grid: Grid, axis: str) -> str:
    """Return the name of an axis. The axis of a single ring is called ``ring``."""
    return axis if grid_rings.is_double(grid) else axis.replace("ring_outer", "ring").replace("ring_inner", "ring")


def _title(plan: Plan) -> str:
    grid = plan.grid
    axes = f" {TIMES} ".join(
        f"{_axis_name(grid, axis)} {grid.size_of(axis)}" for axis in AXES if grid.size_of(axis) > 1
    )
    return f"{plan.scheme}  ·  cp size {grid.cp_size}" + (f" = {axes}" if axes else "")


def _volume(plan: Plan, forward: Schedule, backward: Schedule) -> str:
    """Return the volume received by the busiest rank and its ratio to the lower bound, as text."""
    grid = plan.grid
    # The units of the bounds are one element per Q shard and equal numbers of query and kv heads.
    shape = Shape(tokens=1, q_heads=grid.head, kv_heads=grid.head, head_dim=1)
    limit, units = "the lower bound", "kv heads = query heads"
    if grid.head > 1:
        limit, units = "bound", f"{units}, bound for undivided heads"
    passes = []
    for name, schedule, bound in (
        ("forward", forward, volume_bounds.forward_bound(grid.cp_size, shape.kappa)),
        ("backward", backward, volume_bounds.backward_bound(grid.cp_size, shape.kappa)),
    ):
        received = received_elements(schedule, shape) / shape.unit
        passes.append(f"{name} {received:g} ({volume_bounds.ratio(received, bound):.2f} {TIMES} {limit})")
    return f"Q shards received per rank:  {',  '.join(passes)};  {units}"


def _left_legend(plan: Plan, schedules: Sequence[Schedule], backward: Schedule) -> list[LegendEntry]:
    grid = plan.grid
    entries: list[LegendEntry] = []
    if grid.cp_size <= grid_rings.MAX_WITH_CHUNKS:
        disc = Line2D([], [], ls="none", marker="o", ms=11, mfc="white", mec=INK, mew=1.6)
        entries.append((disc, f"rank with its 2 of the {2 * grid.cp_size} chunks of the sequence (zig-zag)"))
    if grid.head > 1:
        text = f"head: ranks exchange tokens, each has 1/{grid.head} of the heads"
        entries.append((Patch(color=grid_drawing.HEADS), text))
    if grid.team > 1:
        tensors = ", ".join(tensor.upper() for tensor in grid_rings.gathered(schedules[0], "team"))
        combines = any(move.channel == ("team", "results") for move in schedules[0].transfers)
        results = "; combines partial outputs" if combines else ""
        entries.append((Patch(color=grid_drawing.TEAM), f"team: gathers {tensors}{results}"))
    entries += _ring_legend(plan, schedules, backward)
    permuted = {schedule.rank for schedule in schedules if grid_rings.permutation_target(schedule) is not None}
    if permuted:
        shown = "" if permuted <= grid_rings.permutation_shown(grid) else ", two teams shown"
        dashes = Line2D([], [], **{name: grid_drawing.PERMUTATION[name] for name in ("color", "lw", "ls")})
        tensors = "Q" if plan.forward == "pass-q" else "K and V"
        owner = "the team" if plan.kv_order == "paper" else "the rank"
        text = f"before the ring: sends {tensors} of {owner} (Algorithm 2{shown})"
        entries.append((dashes, text))
    if grid_rings.kv_team_of(schedules[0]):
        dots = Line2D([], [], color=INK, lw=1.6, ls=":")
        tensors = ", ".join(tensor.upper() for tensor in grid_rings.gathered(schedules[0], "kv_team"))
        entries.append((dots, f"kv_team: gathers {tensors}; dotted outline: shares them with rank 0"))
    return entries


def _ring_legend(plan: Plan, schedules: Sequence[Schedule], backward: Schedule) -> list[LegendEntry]:
    grid, axis = plan.grid, grid_rings.step_axis(plan.grid)
    rings = grid_rings.rings(schedules, axis)
    if len(rings[0]) == 1:
        return []
    arrow = Line2D([], [], lw=2.2, color=INK, marker=">", markevery=[1], ms=6)
    kind = "inner ring" if grid_rings.is_double(grid) else "ring"
    count = f"{len(rings)} {kind}s" if len(rings) > 1 else kind
    direction = "half in each direction" if plan.bidirectional else "one hop per ring step"
    text = f"{count} of {len(rings[0])}, {direction}: {_on_ring(schedules[0], axis)}; in backward "
    entries: list[LegendEntry] = [(arrow, text + _on_ring(backward, axis))]
    if grid_rings.is_double(grid):
        broad = Line2D([], [], lw=4.5, color=grid_drawing.OUTER_RING, marker=">", markevery=[1], ms=9)
        entries.append((broad, f"outer ring of {grid.ring_outer}: one hop per pass of the inner ring"))
    return entries


def _on_ring(schedule: Schedule, axis: str) -> str:
    """Return the names of all tensors that ranks send along the ring."""
    tensors = {tensor for move in schedule.transfers if move.axis == axis for tensor in move.payload}
    names = {"dout": "dO", "dq": "dQ", "dk": "dK", "dv": "dV"}
    return ", ".join(names.get(tensor, tensor.upper()) for tensor in TENSOR_ORDER if tensor in tensors)


def _right_legend(plan: Plan, pairs: Mapping[Pair, Sequence[PairWork]]) -> list[str]:
    grid = plan.grid
    of_rank_0 = sum(entry.rank == 0 for work in pairs.values() for entry in work)
    number = ", number: ring step" if has_numbers(pairs, grid.cp_size) else ""
    stripe = f"; each stripe is 1/{grid.head} of the heads" if grid.head > 1 else ""
    lines = [
        f"Colour: rank that computes the pair{number}",
        f"Outline: rank 0, {of_rank_0} of the {len(pairs)} pairs{stripe}",
    ]
    if len({entry.area for work in pairs.values() for entry in work}) == 1:
        lines.append("Each pair is computed once and costs the same under the causal mask")
    axes = [_axis_name(grid, axis) for axis in grid.placement]
    if len(axes) == 2:
        lines.append(f"Placement: consecutive ranks along {axes[0]}, then along {axes[1]}")
    elif len(axes) > 2:
        lines.append(f"Placement, fastest axis first: {', '.join(axes)}")
    if plan.head_groups > 1:
        lines.append(f"{plan.head_groups} head groups: transfers of one overlap computation of another")
    return lines


def _legend(figure: Figure, left: float, entries: Sequence[LegendEntry], handlelength: float = 0) -> None:
    """Draw a legend below a panel."""
    if not entries:
        return
    signs, lines = zip(*entries, strict=True)
    available_gap = LEGEND * HEIGHT * 72 / LEGEND_POINTS / len(lines) - 1.3  # in font sizes
    figure.legend(
        signs,
        lines,
        loc="upper left",
        bbox_to_anchor=(left, LEGEND),
        borderaxespad=0,
        borderpad=0,
        frameon=False,
        fontsize=LEGEND_POINTS,
        labelcolor=INK,
        labelspacing=min(MAX_LINE_GAP, available_gap),
        handlelength=handlelength,
        handletextpad=1.0 if handlelength else 0,
    )
