"""Tiled MLPs and a tiled loss give the losses and gradients of the model without tiles."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from tests.megatron.training import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, arguments, baseline, largest_differences
from tests.support.megatron_runs import train

ITERATIONS = 3
SPLIT = "--wallfacer-cp-size 2"
TILES = "--wallfacer-loss-tiles 3 --wallfacer-mlp-tiles 5"
RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
OVERLAPPED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
VIRTUAL = "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
EXACT = Path(__file__).with_name("token_tiles_exact.py")
TOLERANCE = 1e-10


@cache
def compared(tp: int) -> list[dict[str, float]]:
    run = train(tp, [], script=EXACT).check()
    lines = [line for rank in run.ranks for line in rank.output.splitlines()]
    return [json.loads(line.removeprefix("tiles ")) for line in lines if line.startswith("tiles ")]


@pytest.mark.parametrize("tp", [1, 2])
def test_losses_and_gradients_equal_those_without_tiles(tp: int) -> None:
    cases = compared(tp)
    assert len(cases) == {1: 16, 2: 64}[tp]
    for case in cases:
        assert case["loss"] <= TOLERANCE, case
        assert case["gradient"] <= TOLERANCE, case


#: (ranks, flags). Two micro-batches each; three steps, because gradients are not reduced beside backward in the first.
TRAINED = {
    "cp 2, full recomputation": (2, f"{SPLIT} {RECOMPUTED}"),
    "cp 2 x tp 2, overlapped": (4, f"{SPLIT} {OVERLAPPED} --tensor-model-parallel-size 2 --sequence-parallel"),
    "cp 2 x virtual pipeline": (4, f"{SPLIT} --calculate-per-token-loss {VIRTUAL}"),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_that_without_tiles(name: str) -> None:
    ranks, flags = TRAINED[name]
    tiled = train(ranks, arguments(*flags.split(), *TILES.split(), iterations=ITERATIONS)).check()
    plain = [flag for flag in flags.split() if flag not in OVERLAPPED.split()]
    whole = baseline(*plain[2:], "--train-iters", str(ITERATIONS), ranks=ranks // 2)
    loss, grad_norm = largest_differences(tiled, whole)
    assert loss <= LOSS_TOLERANCE
    assert grad_norm <= GRAD_NORM_TOLERANCE
    assert "loss tiles" in tiled.output
    assert "MLP tiles" in tiled.output
