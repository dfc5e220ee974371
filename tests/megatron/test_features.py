"""A few iterations with what people turn on beside context parallelism, against the same without it."""

from __future__ import annotations

import pytest

from tests.megatron.training import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, arguments, largest_differences
from tests.support.megatron_runs import train

ITERATIONS = 3
TEAM, HEADS = "--wallfacer-team-size 2", "--wallfacer-scheme ulysses"
FEATURES = {
    "selective recompute": (2, "--recompute-activations"),
    "full recompute": (2, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "evaluation": (2, "--eval-interval 2 --eval-iters 1"),
    "virtual pipeline": (
        4,
        "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "tensor and sequence parallel, fewer kv heads than ranks": (
        8,
        "--num-query-groups 2 --tensor-model-parallel-size 4 --sequence-parallel",
    ),
    "tensor and sequence parallel, fewer kv heads than divide them": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "gradient accumulation, two sequences": (2, "--micro-batch-size 2 --global-batch-size 8"),
    "distributed optimizer": (4, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
}
#: How the two context-parallel ranks of a feature work together; as a team unless said here.
SPLIT = {
    "full recompute": HEADS,
    "tensor and sequence parallel, fewer kv heads than divide them": HEADS,
    "evaluation": f"{TEAM} --wallfacer-keep-gathered-q",
}


@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str) -> None:
    ranks, text = FEATURES[feature]
    flags = text.split()
    split = ("--wallfacer-cp-size", "2", *SPLIT.get(feature, TEAM).split())
    run = train(ranks, arguments(*flags, *split, iterations=ITERATIONS)).check()
    alone = train(ranks // 2, arguments(*flags, iterations=ITERATIONS)).check()
    assert len(run.losses) == ITERATIONS
    loss, grad_norm = largest_differences(run, alone)
    assert loss <= LOSS_TOLERANCE
    assert grad_norm <= GRAD_NORM_TOLERANCE


def test_cp_size_one() -> None:
    run = train(1, arguments("--wallfacer-cp-size", "1", iterations=ITERATIONS)).check()
    alone = train(1, arguments(iterations=ITERATIONS)).check()
    assert max(largest_differences(run, alone)) <= LOSS_TOLERANCE
