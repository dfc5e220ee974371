"""Collect the data of the page: positions of the ranks, axes, and the steps of both passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import count
from math import isqrt
from typing import Any

from matplotlib.colors import to_hex

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.plots.grid_rings import rank_colours
from megatron_wallfacer.plots.palette import text_colour_on
from megatron_wallfacer.plots.viewer.steps import ChunkSets, step_fields, viewer_steps
from megatron_wallfacer.schedule.grid import Grid, axes_inside, divisors
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape

#: Largest number of ranks of a page, because the circles of more ranks would be too small.
MAX_RANKS = 64
AXIS_TEXTS = {
    "head": "ranks have the same tokens and different heads",
    "team": "ranks share queries",
    "kv_team": "ranks share keys and values",
    "ring_outer": "tensors hop from rank to rank",
    "ring_inner": "tensors hop from rank to rank between two outer hops",
}


def check_sizes(cp_size: int, ranks_per_node: int) -> None:
    """Check that there are not too many ranks for one page.

    Raises:
        OptionError: There are too many ranks, or the number of ranks per node is not positive.
    """
    if cp_size > MAX_RANKS:
        raise OptionError("cp_size", cp_size, f"at most {MAX_RANKS}, the most ranks that a page can show")
    if ranks_per_node < 1:
        raise OptionError("ranks_per_node", ranks_per_node, "a positive number")


def page_data(plan: Plan, shape: Shape, *, causal: bool = True, ranks_per_node: int = 4) -> dict[str, Any]:
    """Return the data that the page shows, for conversion to JSON.

    All head groups have the same steps, so the page shows one head group. The volume depends on ``shape``, the shape of
    one rank's shard. The last node may have fewer ranks.

    Raises:
        OptionError: There are too many ranks, or the number of ranks per node is not positive.
    """
    size = plan.grid.cp_size
    check_sizes(size, ranks_per_node)
    nodes = [rank // ranks_per_node for rank in range(size)]
    chunk_sets: ChunkSets = defaultdict(count().__next__)
    passes = []
    for name, schedule_of in (("forward", forward_schedule), ("backward", backward_schedule)):
        schedules = [schedule_of(plan, rank, causal=causal) for rank in range(size)]
        passes.append({"name": name, "steps": step_fields(viewer_steps(schedules, nodes, shape, chunk_sets))})
    # Each rank has the colour of the plot of the grid.
    causal_forward = [forward_schedule(plan, rank) for rank in range(size)]
    return {
        "scheme": plan.scheme,
        "grid": str(plan.grid),
        "ranks": size,
        "heads": plan.grid.head,
        "causal": causal,
        "chunks": [list(shard_chunks(rank, size)) for rank in range(size)],
        "colours": [[to_hex(colour), text_colour_on(colour)] for colour in rank_colours(plan.grid, causal_forward)],
        "nodes": nodes,
        "columns": columns(plan.grid, min(ranks_per_node, size)),
        "axes": _axes(plan.grid, nodes),
        "blocks": list(chunk_sets),
        "passes": passes,
    }


def columns(grid: Grid, ranks: int) -> int:
    """Return the number of columns in which the ranks of a node are drawn.

    If the fastest varying axis of the grid is short enough, a row shows all ranks along this axis.
    """
    fastest = grid.size_of(grid.placement[0]) if grid.placement else 1
    if ranks % fastest == 0 and fastest * fastest >= ranks and fastest <= 4:
        return fastest
    return next(columns for columns in divisors(ranks) if columns >= isqrt(ranks - 1) + 1)


def _axes(grid: Grid, nodes: Sequence[int]) -> list[dict[str, Any]]:
    inside = axes_inside(grid, [str(node) for node in nodes])
    return [
        {
            "axis": axis,
            "size": grid.size_of(axis),
            "text": AXIS_TEXTS[axis],
            "inside": axis in inside,
            "groups": sorted({grid.neighbours(rank, axis) for rank in range(grid.cp_size)}),
        }
        for axis in grid.placement
    ]
