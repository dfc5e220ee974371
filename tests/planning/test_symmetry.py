"""Which ranks are symmetry."""

from __future__ import annotations

import pytest

from megatron_wallfacer.planning.symmetry import Symmetry
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule

ORDER = ("head", "team", "ring_inner", "ring_outer")


@pytest.mark.parametrize(
    ("grid", "units", "classes"),
    [
        (Grid(ring_outer=16), (4,), 4),  # a rank's place in its node
        (Grid(ring_outer=16), (1, 4), 4),
        (Grid(ring_outer=16), (1,), 1),
        (Grid(ring_outer=4, ring_inner=4, placement=ORDER), (4,), 1),
        (Grid(head=2, team=4, ring_outer=2, placement=ORDER), (4,), 2),  # a team of two nodes
        (Grid(head=2, team=4, ring_outer=2, placement=ORDER), (8,), 1),
        (Grid(team=3, ring_outer=4, placement=ORDER), (4,), 12),  # nodes that cut teams
        (Grid(team=8, ring_outer=8, placement=ORDER), (4, 16), 8),
    ],
)
def test_classes(grid: Grid, units: tuple[int, ...], classes: int) -> None:
    symmetry = Symmetry(grid, units)
    assert len(symmetry.representatives) == classes
    assert {symmetry.class_of(rank) for rank in range(grid.cp_size)} == set(symmetry.representatives)


def test_every_rank_may_be_a_class() -> None:
    symmetry = Symmetry(Grid(ring_outer=8), (1,), every_rank=True)
    assert symmetry.representatives == tuple(range(8))


def test_ranks_of_a_class_have_their_peers_equally_far() -> None:
    grid = Grid(team=2, ring_outer=8, placement=ORDER)
    symmetry = Symmetry(grid, (4,))
    for axis in ("team", "ring_outer"):
        for rank in range(16):
            peers = {symmetry.offset(rank, peer) for peer in grid.neighbours(rank, axis)}
            first = symmetry.class_of(rank)
            assert peers == {symmetry.offset(first, peer) for peer in grid.neighbours(first, axis)}


@pytest.mark.parametrize(
    "grid", [Grid(head=4, ring_outer=2), Grid(2, 2, 1, 2, 2), Grid(2, 1, 2, 3, 1, ("ring_outer", "head", "kv_team"))]
)
def test_ranks_with_other_heads_have_the_same_program_but_for_peers(grid: Grid) -> None:
    symmetry, plan = Symmetry(grid, (1,)), Plan(grid)

    def messages(rank: int, start: int, end: int) -> list[list[tuple]]:
        schedules = forward_schedule(plan, rank, groups=1), backward_schedule(plan, rank, groups=1)
        return [
            # Which chunks they are differs, how many does not.
            sorted((symmetry.translated(one.peer, start, end), one.tag, len(one.chunks)) for one in ends)
            for schedule in schedules
            for move in schedule.transfers
            for ends in (move.sends, move.receives)
        ]

    for rank in range(grid.cp_size):
        first = symmetry.program_rank(rank)
        assert messages(first, first, rank) == messages(rank, rank, rank)
        assert grid.coordinates(first)["head"] == 0
