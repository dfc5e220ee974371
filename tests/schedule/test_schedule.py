"""The proof that every schedule is right: all small ones exhaustively, large ones by random samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from tests.schedule.cases import all_plans, grids, plans
from tests.schedule.machine import check_play
from tests.schedule.proof import (
    Programs,
    check_arrivals,
    check_balance,
    check_coverage,
    check_gradient_path,
    check_moves,
    check_step,
    check_turn,
    resident,
)

passes = st.fixed_dictionaries({"backward": st.booleans(), "causal": st.booleans()})


@pytest.fixture(scope="module", params=range(1, 33))
def small(request: pytest.FixtureRequest) -> list[Programs]:
    """Both passes and both masks of every plan of one size."""
    return [
        Programs(plan, backward=backward, causal=causal)
        for plan in all_plans(request.param)
        for backward in (False, True)
        for causal in (True, False)
    ]


@pytest.fixture
def small_causal(small: list[Programs]) -> list[Programs]:
    """Where the mask makes no difference: it decides the tiles of a schedule and nothing else of it."""
    return [programs for programs in small if programs.causal]


@st.composite
def programs_and_rank(draw: st.DrawFn) -> tuple[Programs, int]:
    """Any pass of any plan of up to 4096 ranks, and one of its ranks."""
    plan = draw(plans())
    return Programs(plan, **draw(passes)), draw(st.integers(0, plan.grid.cp_size - 1))


# --- all of up to 32 ranks ---


def test_small_each_live_pair_is_computed_once(small: list[Programs]) -> None:
    for programs in small:
        check_coverage(programs)


def test_small_every_rank_and_step_has_the_same_work(small: list[Programs]) -> None:
    for programs in small:
        check_balance(programs, programs.ranks)


def test_small_every_move_has_its_counterpart(small_causal: list[Programs]) -> None:
    for programs in small_causal:
        for rank in programs.ranks:
            check_moves(programs, rank)


def test_small_blocks_that_arrive_are_those_the_next_step_names(small_causal: list[Programs]) -> None:
    for programs in small_causal:
        for rank in programs.ranks:
            check_arrivals(programs, rank)


def test_small_gradients_follow_their_blocks_home(small_causal: list[Programs]) -> None:
    for programs in small_causal:
        for rank in programs.ranks if programs.backward else ():
            check_gradient_path(programs, rank)


def test_small_no_rank_gets_stuck_and_every_sum_is_complete(small_causal: list[Programs]) -> None:
    for programs in small_causal:
        check_play(programs)


# --- random ones of up to 4096 ranks ---


@settings(max_examples=400)
@given(programs_and_rank())
def test_large_a_resident_block_meets_every_shard_once(case: tuple[Programs, int]) -> None:
    check_turn(*case)


@settings(max_examples=1000)
@given(programs_and_rank(), st.data())
def test_large_a_step_computes_its_live_pairs_once(case: tuple[Programs, int], data: st.DataObject) -> None:
    programs, rank = case
    step = data.draw(st.sampled_from(programs[rank].steps))
    check_step(step, programs.cp_size, programs.causal)


@settings(max_examples=600)
@given(programs_and_rank())
def test_large_work_is_equal(case: tuple[Programs, int]) -> None:
    programs, rank = case
    check_balance(programs, [rank])


@settings(max_examples=500)
@given(programs_and_rank())
def test_large_every_move_has_its_counterpart(case: tuple[Programs, int]) -> None:
    check_moves(*case, most_members=3)


@settings(max_examples=500)
@given(programs_and_rank())
def test_large_blocks_that_arrive_are_those_the_next_step_names(case: tuple[Programs, int]) -> None:
    check_arrivals(*case)


@settings(max_examples=300)
@given(plans(longest_ring=24), st.booleans(), st.data())
def test_large_a_gradient_follows_its_block_home(plan: Plan, causal: bool, data: st.DataObject) -> None:
    home = data.draw(st.integers(0, plan.grid.cp_size - 1))
    check_gradient_path(Programs(plan, backward=True, causal=causal), home)


@settings(max_examples=150)
@given(plans(largest=96), passes)
def test_large_no_rank_gets_stuck_and_every_sum_is_complete(plan: Plan, options: dict[str, bool]) -> None:
    check_play(Programs(plan, **options))


@pytest.mark.parametrize("axes", [(4096, 1, 1), (1, 4096, 1), (1, 1, 4096), (1024, 4, 1), (4, 1024, 1)])
@pytest.mark.parametrize("backward", [False, True])
def test_longest_axes_share_out_the_work(axes: tuple[int, int, int], backward: bool) -> None:
    programs = Programs(Plan(Grid(*axes)), backward=backward, causal=True)
    check_balance(programs, [1, 2047, 4095])
    check_step(programs[2047].steps[-1], programs.cp_size, causal=True)
    assert resident(programs[2047], 0) == programs.plan.grid.neighbours(2047, "team")


# --- what a schedule says of itself ---


@settings(max_examples=100)
@given(plans(largest=48), st.booleans())
def test_queries_that_were_kept_are_not_gathered_again(plan: Plan, causal: bool) -> None:
    check_play(Programs(plan, backward=True, causal=causal, q_kept=True))


@settings(max_examples=100)
@given(grids())
def test_native_order_has_no_permutation(grid: Grid) -> None:
    for schedule in (forward_schedule(Plan(grid), 0), backward_schedule(Plan(grid), 0)):
        assert all(move.axis != "cp" for move in schedule.moves)


def test_single_rank_moves_nothing() -> None:
    assert forward_schedule(Plan(Grid()), 0).moves == backward_schedule(Plan(Grid()), 0).moves == ()


@settings(max_examples=50)
@given(plans(largest=256), st.data())
def test_schedules_of_equal_plans_are_equal(plan: Plan, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, plan.grid.cp_size - 1))
    again = Plan(plan.grid, plan.scheme, plan.kv_order, plan.backward)
    assert forward_schedule(plan, rank) == forward_schedule(again, rank)


@settings(max_examples=100)
@given(plans(largest=256), st.data())
def test_moves_are_listed_in_program_order(plan: Plan, data: st.DataObject) -> None:
    schedule = backward_schedule(plan, data.draw(st.integers(0, plan.grid.cp_size - 1)))
    turning = [hop for step in schedule.steps for hop in (step.hop, step.grad_hop) if hop]
    assert schedule.moves == (*schedule.prologue, *turning, *schedule.epilogue)


@settings(max_examples=100)
@given(plans(largest=64), st.booleans(), st.data())
def test_mask_decides_the_tiles_and_nothing_else(plan: Plan, backward: bool, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, plan.grid.cp_size - 1))
    causal, full = (Programs(plan, backward=backward, causal=mask)[rank] for mask in (True, False))
    same = replace(full, steps=tuple(replace(b, tiles=a.tiles) for a, b in zip(causal.steps, full.steps, strict=True)))
    assert same == causal
