"""Measured kernels: their curve, other launches, and host time, against measurements on an H200."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_wallfacer.planning.choice import AttentionJob
from megatron_wallfacer.planning.cluster import Cluster, LinkSpeed
from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.planning.measured_kernels import best_rate, call_seconds
from megatron_wallfacer.planning.search import candidates
from megatron_wallfacer.planning.time_bound import estimated_kernel_seconds
from megatron_wallfacer.schedule import program as steps
from megatron_wallfacer.schedule.lower import lower
from megatron_wallfacer.schedule.mask import CAUSAL
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape
from tests.planning.clusters import ALIKE, PLAIN, SHAPE, Choice, choice, with_device
from tests.schedule.test_lower import strides_of

H200 = load_cluster("h200-8x8")
#: Full tiles of 32 heads: tokens of a side, measured microseconds forward and backward (the median of as many FLOPs).
MEASURED = ((2048, 182, 434), (4096, 465, 1333), (16384, 6508, 20702))
EFFICIENCY = Path(__file__).parents[2] / "docs/gpu/h200-2026-11-27/efficiency.csv"


@pytest.mark.parametrize(("tokens", "forward_us", "backward_us"), MEASURED)
def test_measured_sizes_take_what_was_measured(tokens: int, forward_us: float, backward_us: float) -> None:
    found = [call_seconds("h200", tokens * tokens, 32, 128, backward=backward) for backward in (False, True)]
    assert found == pytest.approx([1e-6 * forward_us, 1e-6 * backward_us], rel=0.01)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_more_work_takes_longer_and_the_rate_is_flat_outside(*, backward: bool, causal: bool) -> None:
    options = {"backward": backward, "causal": causal}
    pairs = [1e3 * 1.07**number for number in range(300)]
    seconds = [call_seconds("h200", size, 32, 128, **options) for size in pairs]
    assert seconds == sorted(seconds)
    assert all(size / took <= pairs[-1] / seconds[-1] * (1 + 1e-9) for size, took in zip(pairs, seconds, strict=True))
    for here in (0, -2):
        assert seconds[here + 1] / seconds[here] == pytest.approx(pairs[here + 1] / pairs[here])
    halves = 2 * call_seconds("h200", 1024 * 2048, 32, 128, **options)
    assert halves > 1.05 * call_seconds("h200", 2048 * 2048, 32, 128, **options)
    assert call_seconds("h200", 0.0, 32, 128, **options) == 0.0


def test_no_measured_size_is_faster_than_the_best_rate() -> None:
    for backward, flops in ((False, 4), (True, 10)):
        seconds = [call_seconds("h200", n * n, 32, 128, backward=backward) for n in (512, 2048, 8192, 16384)]
        rates = [flops * n * n * 32 * 128 / took for n, took in zip((512, 2048, 8192, 16384), seconds, strict=True)]
        assert max(rates) <= best_rate("h200", backward=backward) < 700e12


# --- launches ---


def launches(schedule: Schedule, shape: Shape, head: int) -> int:
    """Launches of a lowered pass that are not attention kernels."""
    program = lower(schedule, shape, CAUSAL, strides_of(shape, schedule, head), varlen=False, all_to_all=True)
    kinds = steps.Copy | steps.Permute | steps.Fill | steps.Merge | steps.Sum | steps.OutProxy
    return sum(isinstance(step, kinds) for _, ops in program.steps for step in ops)


@pytest.mark.parametrize("name", ALIKE)
def test_launches_are_those_of_the_lowered_program(name: str) -> None:
    shape = Shape(tokens=8, q_heads=8, kv_heads=8, head_dim=8, v_head_dim=16)
    one = choice(with_device(PLAIN, launch_us=1e6, host_launch_us=2e6), shape, **ALIKE[name])
    for schedule in one.schedules(0):
        costs = one.job.costs.op_costs(schedule)
        counted = sum(cost.launch_s for cost in costs)
        assert counted == pytest.approx(launches(schedule, shape, one.plan.grid.head), rel=0.1, abs=1)
        assert sum(cost.host_s for cost in costs) == pytest.approx(2 * counted)


# --- the host ---


def free(**device: float) -> Cluster:
    """A cluster on which nothing takes time but what is given."""
    return with_device(replace(PLAIN, intra=LinkSpeed(None), inter=LinkSpeed(None)), **device)


@pytest.mark.parametrize("name", ["ring", "team of 2 inside", "all axes"])
def test_a_pass_is_no_faster_than_its_host(name: str) -> None:
    costs = {"host_forward_us": 1000.0, "host_backward_us": 3000.0, "host_launch_us": 100.0, "host_transfer_us": 50.0}
    slow = choice(free(tflops=1e9, **costs), **ALIKE[name])
    host = [sum(cost.host_s for cost in slow.job.costs.op_costs(schedule)) for schedule in slow.schedules(0)]
    calls = [sum(len(op.tiles) for op in schedule.attends) for schedule in slow.schedules(0)]
    assert host[0] >= 1e-3 * calls[0]
    assert host[1] >= 3e-3 * calls[1]
    forward_s, both_s = slow.simulation.pass_s
    assert forward_s == pytest.approx(host[0], rel=0.05)
    assert both_s == pytest.approx(sum(host), rel=0.05)


def test_a_fast_host_is_hidden_behind_the_kernels() -> None:
    """Only the first launches of a pass have nothing to run behind."""
    plain = choice(free(), **ALIKE["ring"]).simulation
    hosted = choice(free(host_forward_us=20.0, host_backward_us=20.0), **ALIKE["ring"]).simulation
    assert plain.seconds < hosted.seconds <= plain.seconds + 2 * 40e-6


# --- against the H200 ---


def predicted_ms(row: dict[str, str]) -> tuple[float, float]:
    """Forward and backward of a measured row: messages take no time, and blocks are in native order."""
    cp_size, q_heads, kv_heads = (int(row[name]) for name in ("cp_size", "q_heads", "kv_heads"))
    shape = Shape(int(row["tokens_k"]) * 1024 // cp_size, q_heads, kv_heads, 128)
    axes = dict(part.split() for part in row["grid"].split(" x "))
    sizes = {f"{axis}_size": int(axes[axis]) for axis in ("team", "kv_team") if axis in axes}
    # In one node all ranks are alike, and one is simulated.
    cluster = replace(H200, nodes=1, gpus_per_node=cp_size, nics=cp_size, intra=LinkSpeed(None), inter=LinkSpeed(None))
    plan = make_plan("team-ring", cp_size, q_heads=q_heads, kv_heads=kv_heads, **{"team_size": 1} | sizes)
    assert str(plan.grid) == row["grid"]
    forward_s, both_s = Choice(AttentionJob(cluster, shape, cp_size), plan).simulation.pass_s
    return 1e3 * forward_s, 1e3 * (both_s - forward_s)


def test_predictions_are_near_what_the_h200_measured() -> None:
    """Where the device was the limit. Below 4K tokens per rank it was the host, with an engine that was slower."""
    rows = [row for row in csv.DictReader(EFFICIENCY.open()) if row["q_heads"] == "32"]
    device_bound = [row for row in rows if int(row["tokens_a_rank"]) >= 4096]
    assert len(device_bound) == 13
    for row in device_bound:
        found = predicted_ms(row)
        measured = float(row["forward_ms"]), float(row["backward_ms"])
        assert found == pytest.approx(measured, rel=0.15), row["grid"]


def test_at_2k_tokens_per_rank_larger_tiles_win_as_measured() -> None:
    """P 512: a K and V team halves the forward time of the ring, although one GPU has no network to save."""
    rows = [
        row for row in csv.DictReader(EFFICIENCY.open()) if row["tokens_a_rank"] == "2048" and row["q_heads"] == "32"
    ]
    found = {row["grid"]: predicted_ms(row) for row in rows if row["kv_heads"] == "8"}
    measured = {row["grid"]: (float(row["forward_ms"]), float(row["backward_ms"])) for row in rows}
    assert len(found) == 3
    order = sorted(found, key=lambda grid: sum(found[grid]))
    assert order == sorted(found, key=lambda grid: sum(measured[grid]))
    # The ring was bound by the host of an engine that was slower.
    for grid in order[:2]:
        assert found[grid] == pytest.approx(measured[grid], rel=0.06), grid


# --- the search ---


def test_blocks_of_scattered_ranks_are_estimated_slower() -> None:
    """Their chunks do not follow each other, so there are many small tiles."""
    shape = Shape(1024, 32, 8, 128)
    seconds = {
        placement: estimated_kernel_seconds(
            make_plan("usp", 64, head_size=32, placement=placement, q_heads=32, kv_heads=8), H200, shape
        )
        for placement in ("head-first", "ring-first")
    }
    assert seconds["ring-first"] > 2 * seconds["head-first"]
    assert estimated_kernel_seconds(make_plan("ring", 16), PLAIN, SHAPE) == choice(**ALIKE["ring"]).bound.kernel_s


def test_one_group_of_heads_is_a_choice_where_kernels_are_measured() -> None:
    groups = {
        name: {one.plan.head_groups for one in candidates(AttentionJob(cluster, SHAPE, 16)) if one.plan.grid.team == 4}
        for name, cluster in (("measured", H200), ("modelled", PLAIN))
    }
    assert groups == {"measured": {1, 2}, "modelled": {2}}
