from math import inf, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.schedule.bounds import backward_bound, forward_bound, ratio
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape, words
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


def test_few_kv_heads_make_moving_them_alone_the_best() -> None:
    assert forward_bound(8, 1 / 128) == pytest.approx(2 / 128 * 7)
    assert backward_bound(8, 1 / 128) == pytest.approx(4 / 128 * 7)


@settings(max_examples=400)
@given(plans(longest_ring=256), st.sampled_from(HEADS), st.data())
def test_no_grid_beats_the_forward_bound(plan: Plan, heads: tuple[int, int], data: st.DataObject) -> None:
    shape = Shape(1, *heads, head_dim=1)
    rank = data.draw(st.integers(0, plan.grid.cp_size - 1))
    bound = forward_bound(plan.grid.cp_size, shape.kappa) * shape.unit
    assert words(forward_schedule(plan, rank), shape) >= bound - 1e-6


@settings(max_examples=400)
@given(plans(longest_ring=256), st.sampled_from(HEADS), st.data())
def test_no_grid_beats_the_backward_bound(plan: Plan, heads: tuple[int, int], data: st.DataObject) -> None:
    shape = Shape(1, *heads, head_dim=1)
    rank = data.draw(st.integers(0, plan.grid.cp_size - 1))
    bound = backward_bound(plan.grid.cp_size, shape.kappa) * shape.unit
    assert words(backward_schedule(plan, rank), shape) >= bound - 1e-6


def test_ratio() -> None:
    assert ratio(6.0, 4.0) == 1.5
    assert ratio(0, 0) == 1
    assert ratio(1, 0) == inf
