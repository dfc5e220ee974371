"""The price that ``auto`` minimises: what it counts, and which grids follow."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.ops import STATISTICS
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.price import attention_calls, cheapest, layer_seconds, received_bytes
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape
from megatron_wallfacer.schedule.volume import received_bytes as counted_bytes
from tests.schedule.cases import plans

HEADS = {"q_heads": 32, "kv_heads": 8}


def chosen(cp_size: int, tokens: int | None = None, **options: int) -> Grid:
    return make_plan("auto", cp_size, **(HEADS | {"tokens": tokens} | options)).grid


@settings(max_examples=60, deadline=None)
@given(plans(largest=64, longest_ring=16))
def test_bytes_are_what_the_schedules_receive(plan: Plan) -> None:
    shape = Shape(2, 4 * plan.grid.head, plan.grid.head, 128)
    rank = busiest_rank(plan)
    received = counted_bytes(forward_schedule(plan, rank), shape) + counted_bytes(backward_schedule(plan, rank), shape)
    expected = sum(size for (_, tensor), size in received.items() if tensor not in STATISTICS)
    assert received_bytes(plan, 2, shape.q_heads, shape.kv_heads) == pytest.approx(expected)


def test_the_price_by_hand() -> None:
    """Ring of 2, 1,024 tokens per rank, 32 and 8 heads: 2 calls per pass, 4 bf16 and 2 fp32 shards of keys received."""
    plan = make_plan("ring", 2, **HEADS)
    flops = 1024 * 1024 * 32 * 128
    compute = 4 * flops / 676e12 + 10 * flops / 531e12 + 2 * (195e-6 + 265e-6)
    transfer = (4 * 2 + 2 * 4) * 1024 * 8 * 128 / 360e9
    assert layer_seconds(plan, 1024, 32, 8) == pytest.approx(max(compute, transfer) + 0.3 * transfer)


GRIDS = [
    Grid(ring_outer=8),
    Grid(kv_team=8),
    Grid(kv_team=2, ring_outer=4),
    Grid(team=2, ring_outer=4),
    Grid(team=4, kv_team=4, ring_outer=4),
    Grid(team=8, kv_team=8, ring_outer=8),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_calls_are_near_what_the_schedules_have(grid: Grid) -> None:
    for schedule in (forward_schedule(Plan(grid), 0), backward_schedule(Plan(grid), 0)):
        calls = sum(len(op.tiles) for op in schedule.attends)
        assert attention_calls(grid) == pytest.approx(calls, rel=0.6, abs=1)


@pytest.mark.parametrize(
    ("cp_size", "tokens", "grid"),
    [
        (2, 1024, {"ring_outer": 2}),
        (2, 65536, {"ring_outer": 2}),
        (4, 4096, {"kv_team": 4}),
        (4, 16384, {"ring_outer": 4}),
        (8, 8192, {"kv_team": 2, "ring_outer": 4}),
        (64, 4096, {"team": 4, "kv_team": 4, "ring_outer": 4}),
        (64, 16384, {"team": 4, "ring_outer": 16}),
        (512, 2048, {"team": 8, "kv_team": 8, "ring_outer": 8}),
    ],
)
def test_few_tokens_are_computed_in_few_calls(cp_size: int, tokens: int, grid: dict[str, int]) -> None:
    assert chosen(cp_size, tokens) == Grid(**grid)


def test_at_most_one_call_per_rank_in_a_node() -> None:
    for cp_size in (2, 4, 8):
        for tokens in (1024, 2048, 4096, 8192, 16384, 65536):
            plan = make_plan("auto", cp_size, tokens=tokens, **HEADS)
            for schedule in (forward_schedule(plan, 0), backward_schedule(plan, 0)):
                assert sum(len(op.tiles) for op in schedule.attends) <= cp_size, (cp_size, tokens)


def test_without_tokens_words_decide_and_no_keys_are_gathered() -> None:
    assert chosen(8) == Grid(team=2, ring_outer=4)
    assert chosen(64) == Grid(team=4, ring_outer=16)


def test_an_axis_by_hand_stays() -> None:
    assert chosen(8, 1024, kv_team_size=1).kv_team == 1
    assert chosen(64, 1024, team_size=8).team == 8
    assert chosen(64, 1024, head_size=8, ring_inner_size=2).head == 8


def test_equal_prices_go_to_what_holds_least_without_many_more_bytes() -> None:
    """At 64K tokens calls cost nothing beside the kernels: the ring holds least, but receives 2.4 times the bytes."""
    ring, team, mesh = (
        make_plan("team-ring", 64, team_size=c, kv_team_size=g, **HEADS) for c, g in ((1, 1), (4, 1), (4, 16))
    )
    options = {"tokens": 65536, **HEADS}
    assert layer_seconds(ring, **options) < 1.05 * layer_seconds(team, **options)
    assert received_bytes(ring, **options) > 1.2 * received_bytes(team, **options)
    assert cheapest([ring, mesh, team], **options) == team


def test_a_group_that_spans_nodes_moves_fewer_bytes() -> None:
    """Tensor parallelism 2 leaves four ranks of the group in a node of eight GPUs."""
    one, two = (chosen(8, 8192, ranks_per_node=ranks) for ranks in (8, 4))
    assert (one, two) == (Grid(kv_team=2, ring_outer=4), Grid(team=2, ring_outer=4))
