"""Bounds in closed form against what the schedules send."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from megatron_wallfacer.planning.cluster import SwitchLevel
from megatron_wallfacer.planning.time_bound import bytes_by_axis
from megatron_wallfacer.schedule.volume import Shape, received_bytes
from tests.planning.clusters import ALIKE, PLAIN, choice


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("keep_gathered_q", [False, True])
@pytest.mark.parametrize("name", sorted(set(ALIKE) - {"both ways"}))
def test_bytes_of_each_axis(name: str, keep_gathered_q: bool, kv_heads: int) -> None:
    shape = Shape(tokens=512, q_heads=8, kv_heads=kv_heads, head_dim=64)
    one = choice(shape=shape, keep_gathered_q=keep_gathered_q, **ALIKE[name])
    counted: Counter[str] = Counter()
    for schedule in one.schedules(0):
        for (axis, _), size in received_bytes(schedule, shape).items():
            counted[axis] += size
    assert dict(counted) == pytest.approx(dict(bytes_by_axis(one.plan, shape, keep_gathered_q=keep_gathered_q)))


def test_the_limiting_resource_is_named() -> None:
    assert choice(**ALIKE["ring"]).bound.resource == "NICs"
    faster = replace(PLAIN, inter=replace(PLAIN.inter, gbyte_s=1e6), intra=replace(PLAIN.intra, gbyte_s=1e6))
    assert choice(faster, **ALIKE["ring"]).bound.resource == "compute"
    slow_ports = replace(faster, intra=replace(PLAIN.intra, gbyte_s=0.1))
    assert choice(slow_ports, **ALIKE["double-ring"]).bound.resource == "links in a node"
    few_links = replace(faster, inter=PLAIN.inter, levels=(SwitchLevel(2, 64.0),))
    assert choice(few_links, **ALIKE["team of 8 across"]).bound.resource == "switches"
