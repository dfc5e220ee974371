from math import inf, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape, received_elements
from megatron_wallfacer.schedule.volume_bounds import (
    backward_bound,
    forward_bound,
    ratio,
)
from tests.schedule.cases import plans

HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (32, 1)]
sizes = st.integers(1, 4096)
kappas = st.sampled_from([1, 1 / 2, 1 / 4, 1 / 8, 1 / 128])


@given(sizes, kappas)
def test_forward_bound_in_closed_form(cp_size: int, kappa: float) -> None:
    if kappa * cp_size >= 1:
        assert forward_bound(cp_size, kappa) == pytest.approx(4 * sqrt(kappa * cp_size) - 2 * (1 + kappa), abs=1e-9)


@given(sizes, kappas)
def test_backward_bound_in_closed_form(cp_size: int, kappa: float) -> None:
    if 4 / 3 * kappa * cp_size >= 1 and 4 / 3 * kappa <= cp_size:
        expected = 2 * sqrt(12 * kappa * cp_size) - (3 + 4 * kappa)
        assert backward_bound(cp_size, kappa) == pytest.approx(expected, abs=1e-9)


@given(sizes, kappas, st.floats(0, 1))
def test_no_projection_costs_less_than_the_bound(cp_size: int, kappa: float, where: float) -> None:
    x = cp_size**where
    assert 2 * (x - 1) + 2 * kappa * (cp_size / x - 1) >= forward_bound(cp_size, kappa) - 1e-6
    assert 3 * (x - 1) + 4 * kappa * (cp_size / x - 1) >= backward_bound(cp_size, kappa) - 1e-6


@given(kappas)
def test_single_rank_needs_no_word(kappa: float) -> None:
    assert forward_bound(1, kappa) == backward_bound(1, kappa) == 0
    assert forward_bound(1, kappa, whole=True) == backward_bound(1, kappa, whole=True) == 0


def test_few_kv_heads_make_moving_them_alone_the_best() -> None:
    assert forward_bound(8, 1 / 128) == pytest.approx(2 / 128 * 7)
    assert backward_bound(8, 1 / 128) == pytest.approx(4 / 128 * 7)


# --- whole shards ---


@given(sizes, kappas, st.data())
def test_no_whole_shards_cost_less_than_their_bound(cp_size: int, kappa: float, data: st.DataObject) -> None:
    x = data.draw(st.integers(1, cp_size))
    y = data.draw(st.integers(-(-cp_size // x), cp_size))
    assert 2 * (x - 1) + 2 * kappa * (y - 1) >= forward_bound(cp_size, kappa, whole=True) - 1e-9
    assert 3 * (x - 1) + 4 * kappa * (y - 1) >= backward_bound(cp_size, kappa, whole=True) - 1e-9


@given(sizes, kappas)
def test_whole_shards_are_bounded_tighter(cp_size: int, kappa: float) -> None:
    assert forward_bound(cp_size, kappa, whole=True) >= forward_bound(cp_size, kappa) - 1e-9
    assert backward_bound(cp_size, kappa, whole=True) >= backward_bound(cp_size, kappa) - 1e-9


@pytest.mark.parametrize("root", range(1, 33))
def test_a_square_of_ranks_meets_both_bounds(root: int) -> None:
    assert forward_bound(root**2, 1, whole=True) == pytest.approx(forward_bound(root**2, 1)) == 4 * (root - 1)


def test_where_whole_shards_cost_more() -> None:
    """16 ranks, 8 query heads a kv head: the square root of 2 query shards would be best, and is none."""
    assert forward_bound(16, 1 / 8, whole=True) == 3.75
    assert forward_bound(16, 1 / 8, whole=True) / forward_bound(16, 1 / 8) == pytest.approx(1.1007, abs=5e-5)


def test_shards_that_no_divisor_fits() -> None:
    """Seven ranks: 2 query shards and 4 key shards are 8 pairs, of which one is not needed."""
    assert forward_bound(7, 1, whole=True) == 2 * 1 + 2 * 3


# --- no grid beats them; one that divides heads does not play the same game ---

undivided = plans(longest_ring=256).filter(lambda plan: plan.grid.head == 1)


@settings(max_examples=400, deadline=None)
@given(undivided, st.sampled_from(HEADS), st.data())
def test_no_grid_beats_the_forward_bounds(plan: Plan, heads: tuple[int, int], data: st.DataObject) -> None:
    shape = Shape(2, *heads, head_dim=1)
    received = received_elements(forward_schedule(plan, _some_rank(plan, data)), shape) / shape.unit
    assert received >= forward_bound(plan.grid.cp_size, shape.kappa) - 1e-6
    assert received >= forward_bound(plan.grid.cp_size, shape.kappa, whole=True) - 1e-6


@settings(max_examples=400, deadline=None)
@given(undivided, st.sampled_from(HEADS), st.data())
def test_no_grid_beats_the_backward_bounds(plan: Plan, heads: tuple[int, int], data: st.DataObject) -> None:
    shape = Shape(2, *heads, head_dim=1)
    received = received_elements(backward_schedule(plan, _some_rank(plan, data)), shape) / shape.unit
    assert received >= backward_bound(plan.grid.cp_size, shape.kappa) - 1e-6
    assert received >= backward_bound(plan.grid.cp_size, shape.kappa, whole=True) - 1e-6


def test_dividing_heads_does_beat_them() -> None:
    shape = Shape(2, 16, 16, head_dim=1)
    received = received_elements(forward_schedule(Plan(Grid(head=16)), 0), shape) / shape.unit
    assert received == 4 * 15 / 16 < forward_bound(16, 1)


def _some_rank(plan: Plan, data: st.DataObject) -> int:
    return data.draw(st.integers(0, plan.grid.cp_size - 1))


def test_ratio() -> None:
    assert ratio(6.0, 4.0) == 1.5
    assert ratio(0, 0) == 1
    assert ratio(1, 0) == inf
