"""Steps that can be worked out by hand, and how parts of one move the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.choice import Choice
from megatron_wallfacer.planning.cluster import Cluster, Device, LinkSpeed
from megatron_wallfacer.planning.model import Model
from megatron_wallfacer.planning.simulated_trace import trace_events
from megatron_wallfacer.planning.training_options import OverlapModel, ParallelSizes, TrainingOptions, parallel_sizes
from megatron_wallfacer.planning.training_step import (
    StepEstimate,
    attention_job,
    estimate_step,
    reduction_seconds,
    simulated_attention,
)
from megatron_wallfacer.schedule.schemes import make_plan

MODEL = Model("small", 4, 1024, 4096, q_heads=8, kv_heads=8, head_dim=128, vocabulary=4096)
#: No latency, no merging: every time is a quotient.
CLUSTER = Cluster("test", 2, 4, LinkSpeed(100), LinkSpeed(10), Device(100, 80), nics=4)
TOKENS = 8192
PLAIN = TrainingOptions(recompute="none")


def choice_of(cluster: Cluster, sizes: ParallelSizes, options: TrainingOptions = PLAIN, scheme: str = "ring") -> Choice:
    job = attention_job(MODEL, cluster, TOKENS, sizes, options)
    heads = {"q_heads": job.shape.q_heads, "kv_heads": job.shape.kv_heads}
    return Choice(job, make_plan(scheme, sizes.cp, head_groups=1, **heads))


def step_of(cluster: Cluster = CLUSTER, options: TrainingOptions = PLAIN, **given: int) -> StepEstimate:
    sizes = parallel_sizes(cluster, **given)
    return estimate_step(MODEL, choice_of(cluster, sizes, options), cluster, sizes, options)


def test_one_rank_computes_and_nothing_else() -> None:
    found = step_of(replace(CLUSTER, nodes=1, gpus_per_node=1))
    attention = 3.5 * MODEL.attention_flops(TOKENS, causal=True) / 100e12
    matrices = 3 * TOKENS * MODEL.matmul_flops() / 50e12
    head = 3 * TOKENS * MODEL.head_flops() / 50e12
    # The diagonal of the two chunks is half a square: the schedule's tiles are exactly causal.
    assert found.attention_s == pytest.approx(attention)
    assert found.exposed_s == pytest.approx(0)
    assert found.seconds == pytest.approx(4 * (attention + matrices) + head)
    assert found.tokens_s == pytest.approx(TOKENS / found.seconds)
    assert found.mfu == pytest.approx(MODEL.step_flops(TOKENS, causal=True) / found.seconds / 100e12)


def test_what_is_recomputed_is_paid_for() -> None:
    none, kept, full = (step_of(options=replace(PLAIN, recompute=how)) for how in ("none", "keep-attention", "full"))
    assert kept.matmul_s == pytest.approx(none.matmul_s * 4 / 3)
    assert kept.attention_s == none.attention_s
    assert full.matmul_s == kept.matmul_s
    forward_s = choice_of(CLUSTER, parallel_sizes(CLUSTER)).simulation.pass_s[0]
    assert full.attention_s == pytest.approx(none.attention_s + forward_s)
    assert none.memory_gb > kept.memory_gb > full.memory_gb


def test_hidden_communication_lies_between_turns_and_overlap() -> None:
    choice = choice_of(CLUSTER, parallel_sizes(CLUSTER))
    times = [
        simulated_attention(choice, replace(PLAIN, overlap=OverlapModel(attention=part))).seconds
        for part in (0.0, 0.5, 1.0)
    ]
    # Taking turns: a ring's 7 hops of K, V forward, and of K, V and, in fp32, dK, dV backward.
    shard = TOKENS / 8 * 1024 * 2
    hops = 7 * (2 + 2 + 4) * shard / 10e9
    assert times[0] == pytest.approx(choice.simulation.kernel_s + hops, rel=1e-6)
    assert times[2] == choice.simulation.seconds < times[0]
    assert times[1] == pytest.approx((times[0] + times[2]) / 2)


def test_gradients_and_weights_cross_all_nics_of_a_node() -> None:
    sizes = parallel_sizes(CLUSTER, cp=2)
    whole = MODEL.layers * MODEL.layer_parameters + MODEL.vocabulary_parameters
    expected = whole * (4 + 2) * 7 / 8 / (4 * 10e9)
    assert reduction_seconds(MODEL, CLUSTER, sizes, PLAIN) == pytest.approx(expected)
    one_nic = replace(CLUSTER, nics=1)
    assert reduction_seconds(MODEL, one_nic, sizes, PLAIN) == pytest.approx(4 * expected)
    # Two tensor-parallel ranks hold half each, and share the NICs.
    halves = parallel_sizes(CLUSTER, tp=2)
    assert reduction_seconds(MODEL, CLUSTER, halves, PLAIN) == pytest.approx(expected * (3 / 4) / (7 / 8))
    assert reduction_seconds(MODEL, CLUSTER, ParallelSizes(), PLAIN) == 0


def test_only_what_is_not_hidden_of_a_reduction_counts() -> None:
    all_of_it = step_of(options=replace(PLAIN, overlap=OverlapModel(reduction=0.0)))
    half = step_of(options=replace(PLAIN, overlap=OverlapModel(reduction=0.5)))
    assert half.reduction_s == pytest.approx(all_of_it.reduction_s / 2)
    assert all_of_it.seconds - half.seconds == pytest.approx(half.reduction_s)


def test_tensor_parallel_groups_share_nics_and_divide_heads() -> None:
    job = attention_job(MODEL, CLUSTER, TOKENS, parallel_sizes(CLUSTER, tp=2), PLAIN)
    assert (job.cp_size, job.shape.q_heads) == (4, 4)
    assert (job.cluster.gpus_per_node, job.cluster.nics, job.cluster.inter.gbyte_s) == (2, 2, 10)
    one_nic = attention_job(MODEL, replace(CLUSTER, nics=1), TOKENS, parallel_sizes(CLUSTER, tp=2), PLAIN)
    assert (one_nic.cluster.nics, one_nic.cluster.inter.gbyte_s) == (1, 5)


def test_a_pipeline_fills_and_drains() -> None:
    one, many = (
        step_of(pp=2, microbatches=count, options=replace(PLAIN, overlap=OverlapModel(reduction=1.0)))
        for count in (1, 7)
    )
    assert many.seconds == pytest.approx(one.seconds * 8 / 2)
    assert many.tokens_s == pytest.approx(one.tokens_s * 7 / 4)


def test_a_device_with_less_memory_does_not_fit() -> None:
    assert step_of().fits
    assert not step_of(replace(CLUSTER, device=replace(CLUSTER.device, memory_gb=1e-3))).fits


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 3}, "tp=3: must be a divisor of the 4 devices of a node"),
        ({"pp": 3}, "pp=3: must be a size for which 8 ranks are a multiple of tp x pp"),
        ({"cp": 3}, "cp=3: must be a divisor of 8, the ranks that tp 1 and pp 1 leave"),
        ({"microbatches": 0}, "microbatches=0: must be a positive number"),
        ({"pp": 8}, "pp=8: must be a divisor of 4 layers"),
    ],
)
def test_sizes_that_do_not_divide_are_errors(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        step_of(**sizes)


def test_a_sequence_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(OptionError, match="seq=1000: must be a multiple of 16"):
        attention_job(MODEL, CLUSTER, 1000, parallel_sizes(CLUSTER), PLAIN)


def test_a_trace_shows_the_simulation() -> None:
    choice = choice_of(CLUSTER, parallel_sizes(CLUSTER))
    spans, result = choice.spans(), choice.simulation
    events = trace_events(spans)
    kernels = [event for event in events if event["ph"] == "X" and event["name"] == "Attend"]
    per_rank = sum(event["dur"] for event in kernels if event["pid"] == kernels[0]["pid"])
    assert per_rank * 1e-6 == pytest.approx(result.kernel_s)
    assert sum(e["ph"] == "b" for e in events) == sum(e["ph"] == "e" for e in events) > 0
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        f"rank {rank}" for rank in {span.rank for span in spans}
    }
    assert max(e["ts"] + e.get("dur", 0) for e in events if "ts" in e) == pytest.approx(result.seconds * 1e6)
