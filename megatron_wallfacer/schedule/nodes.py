"""The axes of a grid that stay inside a node, given the node of each rank."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_wallfacer.schedule.grid import Grid


def axes_inside(grid: Grid, nodes: Sequence[str]) -> tuple[str, ...]:
    """Return the axes with several ranks along which all neighbours of a rank are on its node, in placement order.

    Args:
        grid: sizes of the axes, and placement.
        nodes: name of the node of each rank of the context-parallel group.
    """
    ranks = range(grid.cp_size)
    return tuple(
        axis
        for axis in grid.placement
        if all(len({nodes[peer] for peer in grid.neighbours(rank, axis)}) == 1 for rank in ranks)
    )


def describe(grid: Grid, nodes: Sequence[str]) -> str:
    """Return one line about the number of ranks per node, and the axes that stay inside a node or cross nodes."""
    counts = sorted({nodes.count(node) for node in set(nodes)})
    if len(set(nodes)) == 1:
        return f"{len(nodes)} context-parallel ranks on one"
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    inside = axes_inside(grid, nodes)
    across = [axis for axis in grid.placement if axis not in inside]
    return (
        f"{len(nodes)} context-parallel ranks on {len(set(nodes))}, {each} on each; "
        f"inside one: {', '.join(inside) or 'no axis'}; across: {', '.join(across) or 'no axis'}"
    )
