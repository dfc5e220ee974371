"""What is written into the page: places of the ranks, axes, and the steps of both passes."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.plots.viewer.steps import Blocks, step_fields, steps
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.hosts import axes_inside
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import divisors
from megatron_wallfacer.schedule.volume import Shape

#: More ranks would not be told apart on a page.
MOST_RANKS = 64
SHARES = {
    "head": "share tokens, and divide the heads",
    "team": "share queries",
    "kv_team": "share keys and values",
    "ring_outer": "blocks hop from rank to rank",
    "ring_inner": "blocks hop from rank to rank, between two outer hops",
}


def page_data(plan: Plan, shape: Shape, *, causal: bool = True, ranks_per_node: int = 4) -> dict[str, Any]:
    """Everything that the page shows, as plain data for JSON.

    Args:
        plan: what to show; one group of heads is shown, since the others do the same.
        shape: of a rank's shard, for words.
        causal: the mask.
        ranks_per_node: so many ranks that follow each other stand on a node; the last may have fewer.

    Raises:
        OptionError: more ranks than a page shows, or no ranks on a node.
    """
    size = plan.grid.cp_size
    if size > MOST_RANKS:
        raise OptionError("cp_size", size, f"at most {MOST_RANKS}: more ranks are not told apart on a page")
    if ranks_per_node < 1:
        raise OptionError("ranks_per_node", ranks_per_node, "a positive number")
    nodes = [rank // ranks_per_node for rank in range(size)]
    blocks, passes = Blocks(), []
    for name, schedule_of in (("forward", forward_schedule), ("backward", backward_schedule)):
        schedules = [schedule_of(plan, rank, causal=causal) for rank in range(size)]
        passes.append({"name": name, "steps": step_fields(steps(schedules, nodes, shape, blocks))})
    return {
        "scheme": plan.scheme,
        "grid": str(plan.grid),
        "ranks": size,
        "heads": plan.grid.head,
        "causal": causal,
        "chunks": [list(shard_chunks(rank, size)) for rank in range(size)],
        "colours": rank_colours(plan),
        "nodes": nodes,
        "columns": columns(plan.grid, min(ranks_per_node, size)),
        "axes": _axes(plan.grid, nodes),
        "blocks": blocks.all,
        "passes": passes,
    }


def columns(grid: Grid, ranks: int) -> int:
    """Columns of the ranks of a node: those nearest each other in a row, where that is not too long a row."""
    nearest = grid.size_of(grid.placement[0]) if grid.placement else 1
    if ranks % nearest == 0 and nearest * nearest >= ranks and nearest <= 4:
        return nearest
    return next(columns for columns in divisors(ranks) if columns >= isqrt(ranks - 1) + 1)


def rank_colours(plan: Plan) -> list[list[str]]:
    """By rank its colour, as in the picture of the grid, and that of letters on it."""
    from matplotlib.colors import to_hex

    from megatron_wallfacer.plots.grid_drawing import rank_colours as pictured
    from megatron_wallfacer.plots.palette import ink_on

    schedules = [forward_schedule(plan, rank) for rank in range(plan.grid.cp_size)]
    return [[to_hex(colour), ink_on(colour)] for colour in pictured(plan.grid, schedules)]


def _axes(grid: Grid, nodes: Sequence[int]) -> list[dict[str, Any]]:
    inside = axes_inside(grid, [str(node) for node in nodes])
    return [
        {
            "axis": axis,
            "size": grid.size_of(axis),
            "shares": SHARES[axis],
            "inside": axis in inside,
            "groups": sorted({grid.neighbours(rank, axis) for rank in range(grid.cp_size)}),
        }
        for axis in grid.placement
    ]
