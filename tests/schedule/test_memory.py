"""Buffers counted by hand for small plans, and what the count must have."""

from __future__ import annotations

import pytest

from megatron_wallfacer.schedule import ops
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.lifetimes import Lifetime, lifetimes, waits
from megatron_wallfacer.schedule.memory import graph_bytes, graphed_peak_bytes, peak_bytes, returned_bytes
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape

SHAPE = Shape(tokens=8, q_heads=4, kv_heads=2, head_dim=16)
#: Bytes of one shard of SHAPE: bf16 inputs and results, of queries or of keys and values; fp32 accumulators.
Q, KV, OUT, DQ, DKV, LSE = 1024, 2 * 512, 2048, 2048, 2 * 1024, 128
#: Results of a forward call, which are held until those of another one.
HELD = Q + LSE


def test_one_rank_holds_its_accumulators_and_the_results_that_they_become() -> None:
    assert peak_bytes(forward_schedule(Plan(Grid()), 0), SHAPE) == OUT + LSE + (Q + LSE) + HELD
    # Tiles read the output itself, so there is no proxy.
    assert peak_bytes(backward_schedule(Plan(Grid()), 0), SHAPE) == DQ + DKV + (Q + KV) + (Q + KV)


def test_a_graph_holds_a_copy_of_what_its_pass_reads() -> None:
    passes = [build(Plan(Grid()), 0) for build in (forward_schedule, backward_schedule)]
    forward, backward = (graph_bytes(schedule, SHAPE) - peak_bytes(schedule, SHAPE) for schedule in passes)
    # Held results lie in the pool of the graphs.
    assert forward == Q + KV - HELD
    # The output and its gradient, lse and delta.
    assert backward == Q + KV + 2 * Q + 2 * LSE - (Q + KV)


def test_with_graphs_both_passes_are_held_and_the_larger_results_are_copied() -> None:
    passes = [build(Plan(Grid()), 0) for build in (forward_schedule, backward_schedule)]
    held = sum(graph_bytes(schedule, SHAPE) for schedule in passes)
    assert [returned_bytes(schedule, SHAPE) for schedule in passes] == [Q + LSE, Q + KV]
    assert graphed_peak_bytes(passes, SHAPE) == held + Q + KV


def test_a_ring_of_two() -> None:
    # The accumulator, the K, V that arrive, the copy of K, V that leaves; the results.
    most = peak_bytes(forward_schedule(Plan(Grid(ring_outer=2)), 0), SHAPE)
    # Own rows against own, and then half of them against the keys of rank 1.
    assert most == OUT + LSE + 2 * KV + (Q + LSE) + HELD + HELD // 2


def test_a_team_of_two() -> None:
    # Own and the other's accumulators; the other's queries; what returns. (The copy of the queries has left.)
    # The other's rows are a whole accumulator, so nothing is copied to send them.
    most = peak_bytes(forward_schedule(Plan(Grid(team=2)), 0), SHAPE)
    assert most == 2 * (OUT + LSE) + (OUT + LSE) + Q + (Q + LSE) + 2 * HELD


def test_all_gather() -> None:
    # At the second kernel: three others' K and V put together. Before: as they arrive, and the copy that leaves.
    plan = Plan(Grid(kv_team=4))
    assert peak_bytes(forward_schedule(plan, 0), SHAPE) == OUT + LSE + 2 * 3 * KV + (Q + LSE) + HELD + HELD // 2


def test_what_is_kept_for_backward_outlives_the_pass() -> None:
    schedule = forward_schedule(Plan(Grid(team=2, ring_outer=2)), 0, keep_gathered_q=True)
    (name,) = schedule.keeps
    assert schedule.last_mentions[name] == len(schedule.ops)


def test_what_forward_kept_is_not_counted_again() -> None:
    plan = Plan(Grid(team=2, ring_outer=2))
    kept, again = (backward_schedule(plan, 0, keep_gathered_q=keep_gathered_q) for keep_gathered_q in (True, False))
    assert "gathered.q.0" in kept.given
    assert all(life.name not in kept.given for life in lifetimes(kept) if life.payload != ("dout",))
    assert peak_bytes(kept, SHAPE) < peak_bytes(again, SHAPE)


def test_more_head_groups_hold_less() -> None:
    plan = Plan(Grid(ring_outer=8))
    one, two = (peak_bytes(forward_schedule(plan, 0, groups=groups), SHAPE) for groups in (1, 2))
    assert two < one


@pytest.mark.parametrize("build", [forward_schedule, backward_schedule])
def test_a_transfer_is_waited_for_where_its_arrival_is_first_read(build: object) -> None:
    schedule = build(Plan(Grid(team=2, ring_outer=2, ring_inner=2)), 0)
    for start, end in waits(schedule).items():
        brought = {message.value for message in schedule.ops[start].transfer.receives}
        between = schedule.ops[start + 1 : end]
        assert brought.isdisjoint(name for op in between for name in ops.reads(op))
        assert not brought.isdisjoint(ops.reads(schedule.ops[end]))


def test_a_buffer_lives_until_what_sends_it_has_left() -> None:
    schedule = backward_schedule(Plan(Grid(ring_outer=4)), 0)
    until = waits(schedule)
    for start, op in enumerate(schedule.ops):
        if isinstance(op, ops.SendRecv):
            for message in op.transfer.sends:
                assert any(covers(life, message.value, start, until[start] - 1) for life in lifetimes(schedule))


def covers(life: Lifetime, name: str, first: int, last: int) -> bool:
    return life.name == name and life.first <= first and life.last >= last
