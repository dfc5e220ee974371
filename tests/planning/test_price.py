"""The price that ``auto`` minimises, against the shipped costs and against the simulator."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.planning.measured_kernels import best_rate
from megatron_wallfacer.schedule import price
from megatron_wallfacer.schedule.grid import divisors
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape

H200 = load_cluster("h200-8x8")
HEADS = {"q_heads": 32, "kv_heads": 8}


def test_costs_are_those_of_the_shipped_cluster() -> None:
    device = H200.device
    step_us = 3 * device.host_launch_us + device.host_transfer_us
    assert (device.host_forward_us + step_us, device.host_backward_us + step_us) == price.CALL_US
    rates = [best_rate("h200", backward=backward) for backward in (False, True)]
    assert pytest.approx(rates, rel=0.01) == price.RATES
    assert (8, 1e9 * H200.intra.gbyte_s, 1e9 * H200.inter.gbyte_s) == (price.NODE, price.NVLINK, price.NIC)


@pytest.mark.parametrize(("cp_size", "tokens"), [(4, 4096), (8, 1024), (8, 4096), (8, 16384), (16, 4096)])
def test_the_choice_is_near_the_fastest_of_its_axes(cp_size: int, tokens: int) -> None:
    """The simulator models overlap and placement; the formula does not."""
    cluster = replace(H200, nodes=max(1, cp_size // 8))
    job = AttentionJob(cluster, Shape(tokens, **HEADS, head_dim=128), cp_size)
    options = HEADS | {"tokens": tokens}
    seconds = {
        plan: Choice(job, plan).simulation.seconds
        for team in divisors(cp_size)
        for kv_team in divisors(cp_size // team)
        for plan in [make_plan("team-ring", cp_size, team_size=team, kv_team_size=kv_team, **options)]
    }
    assert seconds[make_plan("auto", cp_size, **options)] <= 1.06 * min(seconds.values())
