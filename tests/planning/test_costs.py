"""Costs of operations, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_wallfacer.planning.cluster import Cluster, HostProcessors
from megatron_wallfacer.planning.costs import COPIED, OUT_PROXY, CostModel
from megatron_wallfacer.schedule.ops import Attend, SendRecv, WriteResult
from megatron_wallfacer.schedule.volume import received_bytes
from tests.planning.clusters import ALIKE, PLAIN, SHAPE, Choice, choice

#: Elements of a rank's queries.
QUERIES = SHAPE.tokens * SHAPE.q_heads * SHAPE.head_dim
#: Bytes that the output proxy of one of them moves: on a GPU in the dtype of the inputs, else in that of accumulators.
CLUSTERS = {
    "gpu": (PLAIN, COPIED * SHAPE.itemsize),
    "cpu": (replace(PLAIN, host=HostProcessors(2, 1.0)), OUT_PROXY * SHAPE.accumulate_itemsize),
}


def proxy_bytes(one: Choice, cluster: Cluster) -> list[float]:
    """Return the bytes of output proxies, for each operation of rank 0's backward that computes one."""
    backward = one.schedules(0)[1]
    with_proxy, without = (CostModel(cluster, SHAPE, out_proxy=made).op_costs(backward) for made in (True, False))
    assert all(replace(a, memory_bytes=b.memory_bytes) == b for a, b in zip(with_proxy, without, strict=True))
    return [
        a.memory_bytes - b.memory_bytes
        for a, b in zip(with_proxy, without, strict=True)
        if a.memory_bytes != b.memory_bytes
    ]


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize(
    ("options", "made", "shards"),
    [
        ({"scheme": "ring"}, 0, 0),  # local queries have their output
        ({"scheme": "ring", "backward": "pass-q"}, 15, 15),  # of each received block
        ({"scheme": "team-ring", "team_size": 4, "backward": "pass-kv", "head_groups": 1}, 1, 3),  # gathered queries
    ],
)
def test_an_output_proxy_is_computed_once_per_received_query(
    options: dict, made: int, shards: int, cluster: str
) -> None:
    on, each = CLUSTERS[cluster]
    found = proxy_bytes(choice(**options), on)
    assert len(found) == made
    assert sum(found) == pytest.approx(each * shards * QUERIES)


def test_forward_makes_none() -> None:
    forward = choice(scheme="ring").schedules(0)[0]
    assert CostModel(PLAIN, SHAPE).op_costs(forward) == CostModel(PLAIN, SHAPE, out_proxy=False).op_costs(forward)


@pytest.mark.parametrize("name", ALIKE)
def test_what_is_sent_is_what_is_received(name: str) -> None:
    """Ranks are alike, so each sends as much as it gets."""
    for schedule in choice(**ALIKE[name]).schedules(0):
        costs = CostModel(PLAIN, SHAPE).op_costs(schedule)
        assert sum(sum(cost.sends) for cost in costs) == pytest.approx(sum(received_bytes(schedule, SHAPE).values()))
        starts = [op for op in schedule.ops if isinstance(op, SendRecv)]
        assert sum(len(cost.sends) for cost in costs) == sum(len(op.transfer.sends) for op in starts)
        assert not any(cost.sends for op, cost in zip(schedule.ops, costs, strict=True) if isinstance(op, Attend))


def test_only_local_rows_are_stored() -> None:
    """An accumulator of merged rows has the rows of the whole team."""
    one = choice(scheme="team-ring", team_size=4, backward="pass-kv", head_groups=1)
    apart, merged = (replace(one, plan=replace(one.plan, shard_work=work)) for work in (None, 0))
    stored = [
        [
            cost.memory_bytes
            for op, cost in zip(schedule.ops, CostModel(PLAIN, SHAPE).op_costs(schedule), strict=True)
            if type(op) is WriteResult
        ]
        for one in (apart, merged)
        for schedule in one.schedules(0)
    ]
    assert merged.schedules(0) != apart.schedules(0)
    assert stored[:2] == stored[2:]
