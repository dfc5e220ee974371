"""Recomputed layers whose attention is not run again: the same training, and no message of forward a second time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.megatron.training import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, arguments, baseline, largest_differences
from tests.support.megatron_runs import RunResult, train

COUNTED = Path(__file__).resolve().parents[1] / "support" / "counted.py"
ITERATIONS = 2
SPLIT = ("--wallfacer-cp-size", "2", "--wallfacer-team-size", "2")
KEEP = "--wallfacer-keep-attention-output"
UNIFORM = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
PIPELINE = "--num-layers 4 --pipeline-model-parallel-size 2"
VIRTUAL = f"{PIPELINE} --num-layers-per-virtual-pipeline-stage 1"
#: (ranks, layout, recomputation). Four micro-batches, and two layers on every rank whatever the layout, so that every
#: rank of each receives the same.
KEPT = {
    "selective": (2, "", "--recompute-activations"),
    "full, uniform, two layers at a time": (2, "", UNIFORM.replace("layers 1", "layers 2")),
    "full, one of the two layers, pipeline": (4, PIPELINE, UNIFORM.replace("uniform", "block")),
    "selective, virtual pipeline": (4, VIRTUAL, "--recompute-activations"),
}


@dataclass(frozen=True)
class Counted:
    """A run, what each rank's attention received, and how many forward passes were still kept in the end."""

    run: RunResult
    received: list[int]
    waiting: list[int]


@cache
def counted(ranks: int, *flags: str) -> Counted:
    run = train(ranks, arguments(*SPLIT, *flags, iterations=ITERATIONS), script=COUNTED).check()
    said = [
        json.loads(line.removeprefix("counted "))
        for rank in run.ranks
        for line in rank.output.splitlines()
        if line.startswith("counted ")
    ]
    return Counted(run, [x["received"] for x in said], [x["waiting"] for x in said])


@pytest.mark.parametrize("name", KEPT)
def test_training_is_the_same_and_receives_no_more_than_without_recomputation(name: str) -> None:
    ranks, layout, recomputation = KEPT[name]
    kept = counted(ranks, *layout.split(), *recomputation.split(), KEEP)
    whole = baseline(*layout.split(), "--train-iters", str(ITERATIONS), ranks=ranks // 2)
    loss, grad_norm = largest_differences(kept.run, whole)
    assert loss <= LOSS_TOLERANCE
    assert grad_norm <= GRAD_NORM_TOLERANCE
    assert kept.received == counted(2).received * (ranks // 2)
    assert kept.waiting == [0] * ranks


def test_dropout_and_evaluation_beside_it_and_what_is_saved() -> None:
    """Numbers as if all had been replayed; and the same count of a run that does replay is larger."""
    flags = (*UNIFORM.split(), "--hidden-dropout", "0.1", "--eval-interval", "1", "--eval-iters", "1")
    kept, replayed = counted(2, *flags, KEEP), counted(2, *flags)
    assert kept.run.losses == replayed.run.losses
    assert kept.run.grad_norms == replayed.run.grad_norms
    assert kept.waiting == [0, 0]
    for less, more in zip(kept.received, replayed.received, strict=True):
        assert less < 0.9 * more


def test_it_is_rejected_where_nothing_is_recomputed() -> None:
    run = train(2, arguments(*SPLIT, KEEP, iterations=1))
    assert run.exit_codes == [2, 2]
    for rank in run.ranks:
        assert f"{KEEP}: must be given with flags that recompute attention" in rank.output
