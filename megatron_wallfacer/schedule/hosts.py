"""Which axes of a grid stay inside a host: read from where the ranks are, not from their numbers."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_wallfacer.schedule.grid import Grid


def axes_inside(grid: Grid, hosts: Sequence[str]) -> tuple[str, ...]:
    """The wide axes, in placement order, along which every rank's neighbours all share its host.

    Args:
        grid: axes and placement.
        hosts: by rank of the context-parallel group, the name of its machine.
    """
    ranks = range(grid.cp_size)
    return tuple(
        axis
        for axis in grid.placement
        if all(len({hosts[peer] for peer in grid.neighbours(rank, axis)}) == 1 for rank in ranks)
    )


def describe(grid: Grid, hosts: Sequence[str]) -> str:
    """One line: how the ranks stand on hosts, and which axes cross from one to another."""
    counts = sorted({hosts.count(host) for host in set(hosts)})
    if len(set(hosts)) == 1:
        return f"{len(hosts)} context-parallel ranks on one"
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    inside = axes_inside(grid, hosts)
    across = [axis for axis in grid.placement if axis not in inside]
    return (
        f"{len(hosts)} context-parallel ranks on {len(set(hosts))}, {each} on each; "
        f"inside one: {', '.join(inside) or 'no axis'}; across: {', '.join(across) or 'no axis'}"
    )
