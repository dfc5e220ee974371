"""The closed formulas say what the schedules count, for every small plan."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.formulas import backward_volume, busiest_rank, forward_volume
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.heads import check_heads
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape, messages, received_elements
from tests.schedule.cases import all_plans, plans, published

#: Query and kv heads; the last two have fewer kv heads than some head axes, and so copies.
HEADS = [(48, 48), (48, 12), (48, 2), (48, 1)]


def fits(plan: Plan, heads: tuple[int, int]) -> bool:
    try:
        check_heads(plan, *heads)
    except OptionError:
        return False
    return True


def counted(
    plan: Plan, heads: tuple[int, int], *, rank: int | None = None, keep_gathered_q: bool = False
) -> tuple[float, float]:
    """Volume of a rank in query shards, forward and backward, from its schedules."""
    shape, rank = Shape(2, *heads, head_dim=1), busiest_rank(plan) if rank is None else rank
    schedules = (
        forward_schedule(plan, rank, keep_gathered_q=keep_gathered_q),
        backward_schedule(plan, rank, keep_gathered_q=keep_gathered_q),
    )
    forward, backward = (received_elements(schedule, shape) / shape.unit for schedule in schedules)
    return forward, backward


def formulas(plan: Plan, heads: tuple[int, int], *, keep_gathered_q: bool = False) -> tuple[float, float]:
    kappa, kv_heads = heads[1] / heads[0], heads[1]
    return forward_volume(plan, kappa, kv_heads=kv_heads), backward_volume(
        plan, kappa, kv_heads=kv_heads, keep_gathered_q=keep_gathered_q
    )


@pytest.mark.parametrize("keep_gathered_q", [False, True])
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 6, 8, 9, 12, 16])
def test_formulas_are_what_is_counted_for_every_small_plan(cp_size: int, keep_gathered_q: bool) -> None:
    compared = 0
    for plan in all_plans(cp_size):
        for heads in HEADS:
            if fits(plan, heads):
                expected = pytest.approx(counted(plan, heads, keep_gathered_q=keep_gathered_q))
                assert formulas(plan, heads, keep_gathered_q=keep_gathered_q) == expected, plan
                compared += 1
    assert compared >= len(HEADS)


@settings(max_examples=150, deadline=None)
@given(plans(largest=512, longest_ring=64), st.booleans())
def test_formulas_are_what_is_counted_for_larger_plans(plan: Plan, keep_gathered_q: bool) -> None:
    heads = (plan.grid.head * 4, plan.grid.head)
    assert formulas(plan, heads, keep_gathered_q=keep_gathered_q) == pytest.approx(
        counted(plan, heads, keep_gathered_q=keep_gathered_q)
    )


def test_without_a_number_of_kv_heads_none_has_copies() -> None:
    plan = Plan(Grid(head=8, ring_outer=2))
    assert forward_volume(plan, 1 / 4) == pytest.approx(forward_volume(plan, 1 / 4, kv_heads=8))
    assert forward_volume(plan, 1 / 4) < forward_volume(plan, 1 / 4, kv_heads=2)


# --- the formulas of docs/schemes.md, written out ---


@pytest.mark.parametrize("kappa", [1, 1 / 4, 1 / 8])
def test_known_cases(kappa: float) -> None:
    ring, mesh, ulysses = Plan(Grid(ring_outer=16)), Plan(Grid(team=4, kv_team=4)), Plan(Grid(head=16))
    assert (forward_volume(ring, kappa), backward_volume(ring, kappa)) == (2 * kappa * 15, 4 * kappa * 15)
    assert forward_volume(mesh, kappa) == 2 * 3 + 2 * kappa * 3
    assert backward_volume(mesh, kappa) == 3 * 3 + 4 * kappa * 3
    assert forward_volume(ulysses, kappa) == backward_volume(ulysses, kappa) == (2 + 2 * kappa) * 15 / 16
    burst = Plan(Grid(ring_outer=16), backward="pass-q")
    assert backward_volume(burst, kappa) == 3 * 15
    paper = published(64, 4)
    assert forward_volume(paper, kappa) == 2 * 3 + 2 * kappa * (3 + 16)
    assert backward_volume(paper, kappa) == 3 * (3 + 16) + 4 * kappa * 3
    cheap = published(64, 4, order="permuted")
    assert forward_volume(cheap, kappa) == 2 * 3 + 2 * kappa * 16


# --- the busiest rank ---


@pytest.mark.parametrize("cp_size", [1, 2, 4, 8, 12])
def test_no_rank_receives_more_than_the_busiest(cp_size: int) -> None:
    for plan in all_plans(cp_size)[::7]:
        most = counted(plan, (48, 48))
        for rank in range(cp_size):
            some = counted(plan, (48, 48), rank=rank)
            assert some[0] <= most[0] + 1e-9, (plan, rank)
            assert some[1] <= most[1] + 1e-9, (plan, rank)


@pytest.mark.parametrize(
    ("head", "placement"), [(1, ("team", "ring_outer", "kv_team")), (2, ("head", "team", "kv_team"))]
)
def test_the_published_order_leaves_rank_0_its_block(head: int, placement: tuple[str, ...]) -> None:
    grid = Grid(head=head, team=2, kv_team=2, ring_outer=2 // head, placement=placement)
    plan = Plan(grid, kv_order="paper")
    assert counted(plan, (8, 8), rank=0) < counted(plan, (8, 8))


# --- messages, as docs/schemes.md has them ---


def messages_of(plan: Plan) -> tuple[int, int]:
    """Messages that a rank receives for one head group: Q, O and K+V; in backward Q, dO, dQ, K+V and dK+dV."""
    grid = plan.grid

    def each(side: str, ring_operand: str) -> int:
        team = grid.team if side == "q" else grid.kv_team
        entry = plan.kv_order != "native" and grid.team > 1
        return team - 1 + (grid.ring - 1 + entry if side == ring_operand else 0)

    exchange = 3 * (grid.head - 1)
    forward, backward = (plan.ring_operand(backward=backward) for backward in (False, True))
    received_forward = 2 * each("q", forward) + each("kv", forward)
    return exchange + received_forward, exchange + 3 * each("q", backward) + 2 * each("kv", backward)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cp_size", [1, 2, 4, 6, 8, 12])
def test_messages_are_what_is_counted(cp_size: int, groups: int) -> None:
    for plan in all_plans(cp_size):
        rank, expected = busiest_rank(plan), messages_of(plan)
        assert messages(forward_schedule(plan, rank, groups=groups)) == groups * expected[0], plan
        assert messages(backward_schedule(plan, rank, groups=groups)) == groups * expected[1], plan
