"""Where axes stand on machines."""

from __future__ import annotations

import pytest

from megatron_wallfacer.schedule.grid import Grid, axes_inside, describe_nodes

TWO = ("a",) * 4 + ("b",) * 4


@pytest.mark.parametrize(
    ("placement", "hosts", "inside"),
    [
        (("team", "ring_inner", "ring_outer"), TWO, ("team", "ring_inner")),
        (("ring_outer", "team", "ring_inner"), TWO, ("ring_outer", "team")),
        # Tensor parallelism of half a machine: neighbours of the group are two to a machine.
        (("team", "ring_inner", "ring_outer"), tuple("aabbccdd"), ("team",)),
        # Round robin: neighbours by number are never neighbours by machine.
        (("team", "ring_inner", "ring_outer"), tuple("abababab"), ("ring_inner", "ring_outer")),
        (("team", "ring_inner", "ring_outer"), tuple("abcdefgh"), ()),
        (("team", "ring_inner", "ring_outer"), ("a",) * 8, ("team", "ring_inner", "ring_outer")),
    ],
)
def test_axes_inside_a_host(placement: tuple[str, ...], hosts: tuple[str, ...], inside: tuple[str, ...]) -> None:
    grid = Grid(team=2, ring_outer=2, ring_inner=2, placement=placement)
    assert axes_inside(grid, hosts) == inside


def test_one_line() -> None:
    grid = Grid(head=2, team=2, ring_outer=2)
    assert describe_nodes(grid, ("a",) * 8) == "All context-parallel ranks are on one node."
    assert describe_nodes(grid, TWO) == (
        "8 context-parallel ranks are on 2 nodes, 4 on each. Axes inside a node: head, team. "
        "Axes across nodes: ring_outer."
    )
    uneven = "8 context-parallel ranks are on 3 nodes, 1 to 4 on each. Axes inside a node: none."
    assert describe_nodes(grid, tuple("aaabbbbc")).startswith(uneven)
