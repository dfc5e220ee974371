"""Small attention calls are merged where that saves more than it costs, and the counts that come of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.merging import LEAST_WORK, ranks_per_call
from megatron_wallfacer.schedule.ops import Accumulate, Attend, Schedule, SendRecv
from megatron_wallfacer.schedule.plan import Plan, shard_work
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import make_plan
from tests.schedule.cases import SMALL_CALLS, published

HEADS = {"q_heads": 32, "kv_heads": 8}
TEAM_RING = Plan(Grid(team=4, ring_outer=4), shard_work=SMALL_CALLS)


def calls(schedule: Schedule) -> int:
    return sum(len(op.tiles) for op in schedule.attends)


def query_values(schedule: Schedule) -> list[str]:
    return [op.q[0].split(".", 1)[0] for op in schedule.attends]


@pytest.mark.parametrize(
    ("scheme", "cp_size", "options", "most"),
    [
        ("team-ring", 512, {"team_size": 16}, (40, 45)),
        ("ring", 512, {}, (512, 512)),
        ("wallfacer", 512, {}, (20, 8)),
        ("auto", 2, {}, (2, 2)),
        ("auto", 4, {}, (4, 4)),
        ("auto", 8, {}, (8, 8)),
        ("ulysses", 8, {}, (1, 1)),
    ],
)
def test_attention_calls_at_2048_tokens_per_rank(
    scheme: str, cp_size: int, options: dict[str, int], most: tuple[int, int]
) -> None:
    plan = make_plan(scheme, cp_size, tokens=2048, **HEADS, **options)
    rank = busiest_rank(plan)
    found = calls(forward_schedule(plan, rank)), calls(backward_schedule(plan, rank))
    assert plan.head_groups == 1 or plan.grid.head > 1
    assert all(count <= limit for count, limit in zip(found, most, strict=True)), found


def test_local_and_gathered_rows_are_one_call_in_the_ring_steps_between_the_first_and_the_last() -> None:
    assert query_values(forward_schedule(TEAM_RING, 0)) == ["local", "team", "team", "team", "team", "local"]
    assert query_values(backward_schedule(TEAM_RING, 0)) == ["local", "team", "team", "team", "team"]


def test_results_of_merged_rows_are_one_accumulator() -> None:
    for schedule in (forward_schedule(TEAM_RING, 0), backward_schedule(TEAM_RING, 0)):
        assert {op.q_into for op in schedule.attends} == {"team.acc.q.0"}
        assert {op.into for op in schedule.ops if isinstance(op, Accumulate) and ".q." in op.into} == {"team.acc.q.0"}


def test_first_ring_step_does_not_wait_for_the_gather() -> None:
    for schedule in (forward_schedule(TEAM_RING, 0), backward_schedule(TEAM_RING, 0)):
        first = next(op for op in schedule.ops if isinstance(op, Attend))
        assert first.q[0] == "local.q.0"


def test_local_rows_of_the_last_ring_step_are_computed_while_results_are_sent_home() -> None:
    ops = forward_schedule(TEAM_RING, 0).ops
    last = max(index for index, op in enumerate(ops) if isinstance(op, Attend))
    assert ops[last].q == ("local.q.0",)
    assert [op.transfer.axis for op in ops[:last] if isinstance(op, SendRecv)][-1] == "team"


@pytest.mark.parametrize(("tokens", "ranks"), [(1024, 16), (2048, 4), (4096, 1), (16384, 1)])
def test_ranks_share_a_call_until_it_has_the_least_work(tokens: int, ranks: int) -> None:
    plan = replace(TEAM_RING, shard_work=shard_work(tokens, 32))
    assert ranks_per_call(plan, 1) == ranks


@pytest.mark.parametrize(
    ("grid", "work", "merged"),
    [
        (Grid(team=4, ring_outer=16), LEAST_WORK, True),
        (Grid(team=4, ring_outer=16), LEAST_WORK + 1, False),  # large calls gain nothing
        (Grid(team=4, ring_outer=16), None, False),
        (Grid(team=4, ring_outer=3), LEAST_WORK, False),  # one ring step does not pay for the copy
        (Grid(team=4, ring_outer=3), LEAST_WORK // 4, True),
        (Grid(team=2, ring_outer=4), LEAST_WORK // 4, False),  # two shards would be copied, and results to send them
        (Grid(team=2, ring_outer=6), LEAST_WORK // 4, True),
        (Grid(team=4, ring_outer=2), SMALL_CALLS, False),  # the first ring step and the last
        (Grid(ring_outer=16), SMALL_CALLS, False),
        (Grid(head=2, team=4, ring_outer=16), LEAST_WORK, False),  # twice the rows and columns, half the heads
        (Grid(head=2, team=4, ring_outer=16), LEAST_WORK // 2, True),
    ],
)
def test_rows_are_merged_where_that_pays(grid: Grid, work: int | None, merged: bool) -> None:
    schedule = forward_schedule(Plan(grid, shard_work=work), 0)
    assert ("team" in query_values(schedule)) == merged


def test_published_blocks_are_merged_in_both_passes() -> None:
    plan = replace(published(16, 2, order="permuted"), shard_work=SMALL_CALLS)
    assert "team" in query_values(forward_schedule(plan, 0))
    assert {op.kv[0] for op in backward_schedule(plan, 0).attends} == {"team.kv.0"}


def test_merged_rows_send_no_more() -> None:
    for build in (forward_schedule, backward_schedule):
        apart, merged = (
            sum(len(message.chunks) for transfer in build(plan, 5).transfers for message in transfer.receives)
            for plan in (replace(TEAM_RING, shard_work=None), TEAM_RING)
        )
        assert apart == merged
