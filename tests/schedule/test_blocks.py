"""The paper's arrangement exactly as published (Algorithms 2 and 3), and where blocks are in the native one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.schedule.blocks import blocks_of
from megatron_wallfacer.schedule.grid import RINGS_ADJACENT, Grid
from megatron_wallfacer.schedule.moves import Hop
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import Schedule, backward_schedule, forward_schedule
from tests.schedule.cases import PUBLISHED, grids, published

sizes = pytest.mark.parametrize(("cp_size", "team"), PUBLISHED)


def get_init_send(rank: int, cp_size: int, team: int) -> int:
    """Algorithm 2, line by line, for teams of neighbouring ranks."""
    d_t, d_a = cp_size // team, team
    r_t, r_a = divmod(rank, d_a)
    gs = d_t // d_a
    target_team = r_a * gs + r_t // d_a
    target_member = r_t % d_a
    return target_team * d_a + target_member


def get_p2p(rank: int, cp_size: int, team: int) -> tuple[int, int]:
    """Algorithm 3, line by line: (next, last)."""
    d_t, d_a = cp_size // team, team
    r_t, r_a = divmod(rank, d_a)
    gs = d_t // d_a
    g = r_t // gs
    next_team = (r_t + 1) % gs + gs * g
    last_team = (r_t - 1) % gs + gs * g
    return next_team * d_a + r_a, last_team * d_a + r_a


def permutation(schedule: Schedule) -> tuple[int, int]:
    """(to, from) of the hop before the first step; the rank itself where there is none."""
    hops = [(move.send_to, move.recv_from) for move in schedule.prologue if isinstance(move, Hop)]
    return hops[0] if hops else (schedule.rank, schedule.rank)


@sizes
@pytest.mark.parametrize("build", [forward_schedule, backward_schedule])
def test_permutation_is_algorithm_2(cp_size: int, team: int, build: object) -> None:
    receive_from = {get_init_send(rank, cp_size, team): rank for rank in range(cp_size)}
    for rank in range(cp_size):
        sent_to, received_from = permutation(build(published(cp_size, team), rank))
        assert (sent_to, received_from) == (get_init_send(rank, cp_size, team), receive_from[rank])


@sizes
@pytest.mark.parametrize("build", [forward_schedule, backward_schedule])
def test_ring_hops_are_algorithm_3(cp_size: int, team: int, build: object) -> None:
    for rank in range(cp_size):
        hops = [step.hop for step in build(published(cp_size, team), rank).steps[:-1]]
        assert [(hop.send_to, hop.recv_from) for hop in hops] == [get_p2p(rank, cp_size, team)] * len(hops)


@sizes
def test_there_are_c_squared_rings_of_p_over_c_squared_ranks(cp_size: int, team: int) -> None:
    grid = published(cp_size, team).grid
    rings = {grid.neighbours(rank, "ring") for rank in range(cp_size)}
    assert len(rings) == team**2
    assert {len(ring) for ring in rings} == {cp_size // team**2}


@sizes
def test_member_sees_the_teams_of_its_own_number_modulo_c(cp_size: int, team: int) -> None:
    for rank in range(cp_size):
        seen = {step.kv_ranks[0] // team for step in forward_schedule(published(cp_size, team), rank).steps}
        assert seen == set(range(rank % team, cp_size // team, team))


@sizes
def test_permuted_blocks_are_whole_teams(cp_size: int, team: int) -> None:
    for step in forward_schedule(published(cp_size, team), 1).steps:
        first = step.kv_ranks[0]
        assert first % team == 0
        assert step.kv_ranks == tuple(range(first, first + team))


def test_paper_figure_of_eight_ranks_in_teams_of_two() -> None:
    plan = published(8, 2)
    assert [permutation(forward_schedule(plan, rank))[0] for rank in range(8)] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert [forward_schedule(plan, rank).steps[0].hop.send_to for rank in range(8)] == [2, 3, 0, 1, 6, 7, 4, 5]


def test_rings_adjacent_placement_is_the_same_arrangement_on_other_ranks() -> None:
    adjacent, apart = (published(32, 2, placement).grid for placement in (("team", "ring", "kv_team"), RINGS_ADJACENT))
    renamed = {rank: apart.rank(adjacent.coordinates(rank)) for rank in range(32)}
    for rank in range(32):
        here, there = (
            blocks_of(Plan(grid, "wallfacer", "paper", "q"), r, rider="kv")
            for grid, r in ((adjacent, rank), (apart, renamed[rank]))
        )
        assert there.riders == tuple(tuple(renamed[member] for member in block) for block in here.riders)
        assert there.entry == tuple(renamed[peer] for peer in here.entry)


@settings(max_examples=200)
@given(grids(largest=512, longest_ring=64), st.data())
def test_native_blocks_are_the_teams_of_the_grid(grid: Grid, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, grid.cp_size - 1))
    blocks = blocks_of(Plan(grid), rank, rider="kv")
    assert blocks.team == grid.neighbours(rank, "team")
    assert blocks.riders[0] == blocks.kv_home == grid.neighbours(rank, "kv_team")


@settings(max_examples=200)
@given(grids(largest=512, longest_ring=64), st.data())
def test_native_ring_hops_to_the_next_on_the_ring(grid: Grid, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, grid.cp_size - 1))
    ring = grid.neighbours(rank, "ring")
    place = ring.index(rank)
    assert blocks_of(Plan(grid), rank, rider="kv").ring == (ring[(place + 1) % len(ring)], ring[place - 1])
