"""What operations cost, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_wallfacer.planning.cluster import Cluster, Host
from megatron_wallfacer.planning.costs import COPIED, STAND_IN, Costs
from megatron_wallfacer.schedule.ops import Attend, Start, Store
from megatron_wallfacer.schedule.volume import received_bytes
from tests.planning.clusters import ALIKE, PLAIN, SHAPE, Choice, choice

#: Elements of a rank's queries.
QUERIES = SHAPE.tokens * SHAPE.q_heads * SHAPE.head_dim
#: Bytes that a stand-in for one of them moves: on a GPU in the dtype of the inputs, else in that of sums.
CLUSTERS = {
    "gpu": (PLAIN, COPIED * SHAPE.itemsize),
    "cpu": (replace(PLAIN, host=Host(2, 1.0)), STAND_IN * SHAPE.accumulate_itemsize),
}


def stand_ins(one: Choice, cluster: Cluster) -> list[float]:
    """Bytes that stand-ins touch, of each operation of rank 0's backward that makes one."""
    backward = one.schedules(0)[1]
    with_them, without = (Costs(cluster, SHAPE, stand_ins=made).of(backward) for made in (True, False))
    assert all(replace(a, touched=b.touched) == b for a, b in zip(with_them, without, strict=True))
    return [a.touched - b.touched for a, b in zip(with_them, without, strict=True) if a.touched != b.touched]


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize(
    ("options", "made", "shards"),
    [
        ({"scheme": "ring"}, 0, 0),  # own queries have their output
        ({"scheme": "ring", "backward": "q"}, 15, 15),  # of each that visits
        ({"scheme": "team-ring", "team_size": 4, "backward": "kv", "head_groups": 1}, 1, 3),  # the others'
    ],
)
def test_a_stand_in_is_made_once_of_each_query_that_comes(options: dict, made: int, shards: int, cluster: str) -> None:
    on, each = CLUSTERS[cluster]
    found = stand_ins(choice(**options), on)
    assert len(found) == made
    assert sum(found) == pytest.approx(each * shards * QUERIES)


def test_forward_makes_none() -> None:
    forward = choice(scheme="ring").schedules(0)[0]
    assert Costs(PLAIN, SHAPE).of(forward) == Costs(PLAIN, SHAPE, stand_ins=False).of(forward)


@pytest.mark.parametrize("name", ALIKE)
def test_what_is_sent_is_what_is_received(name: str) -> None:
    """Ranks are alike, so each sends as much as it gets."""
    for schedule in choice(**ALIKE[name]).schedules(0):
        costs = Costs(PLAIN, SHAPE).of(schedule)
        assert sum(sum(cost.sends) for cost in costs) == pytest.approx(sum(received_bytes(schedule, SHAPE).values()))
        starts = [op for op in schedule.ops if isinstance(op, Start)]
        assert sum(len(cost.sends) for cost in costs) == sum(len(op.move.sends) for op in starts)
        assert not any(cost.sends for op, cost in zip(schedule.ops, costs, strict=True) if isinstance(op, Attend))


def test_only_own_rows_are_stored() -> None:
    """A sum of merged rows has those of the whole team."""
    one = choice(scheme="team-ring", team_size=4, backward="kv", head_groups=1)
    apart, merged = (replace(one, plan=replace(one.plan, shard_work=work)) for work in (None, 0))
    stored = [
        [
            cost.touched
            for op, cost in zip(schedule.ops, Costs(PLAIN, SHAPE).of(schedule), strict=True)
            if type(op) is Store
        ]
        for one in (apart, merged)
        for schedule in one.schedules(0)
    ]
    assert merged.schedules(0) != apart.schedules(0)
    assert stored[:2] == stored[2:]
