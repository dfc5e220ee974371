"""Tiled MLPs and a tiled loss give the losses and gradients of the model without tiles."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.flags import Flags
from megatron_wallfacer.megatron.hooks.memory import loss_tiles_hook
from megatron_wallfacer.megatron.loss_tiles import tiled_loss
from megatron_wallfacer.megatron.settings import Settings
from megatron_wallfacer.schedule.schemes import make_plan
from tests.megatron.training import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, arguments, baseline, largest_differences
from tests.support.megatron_runs import train

ITERATIONS = 3
SPLIT = "--wallfacer-cp-size 2"
TILES = "--wallfacer-loss-tiles 3 --wallfacer-mlp-tiles 5"
RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
OVERLAPPED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
VIRTUAL = "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
EXACT = Path(__file__).with_name("token_tiles_exact.py")
ROUNDING = EXACT.with_name("token_tiles_rounding.py")
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
    "cp 4, overlapped": (4, f"--wallfacer-cp-size 4 {OVERLAPPED}"),
    "cp 1 x pipeline, full recomputation, overlapped": (
        2,
        f"--wallfacer-cp-size 1 {OVERLAPPED} --calculate-per-token-loss --pipeline-model-parallel-size 2 {RECOMPUTED}",
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_that_without_tiles(name: str) -> None:
    ranks, flags = TRAINED[name]
    tiled = train(ranks, arguments(*flags.split(), *TILES.split(), iterations=ITERATIONS)).check()
    plain = [flag for flag in flags.split() if flag not in OVERLAPPED.split()]
    _, cp_size, *plain = plain
    whole = baseline(*plain, "--train-iters", str(ITERATIONS), ranks=ranks // int(cp_size))
    loss, grad_norm = largest_differences(tiled, whole)
    assert loss <= LOSS_TOLERANCE
    assert grad_norm <= GRAD_NORM_TOLERANCE
    assert "loss tiles" in tiled.output
    assert "MLP tiles" in tiled.output


def test_tiles_round_gradients_in_bf16_no_more_than_the_whole() -> None:
    """64 tiles. Sums in bf16, which --grad-reduce-in-bf16 would make and which is an error, are the control."""
    run = train(1, [], script=ROUNDING).check()
    (line,) = [line for line in run.output.splitlines() if line.startswith("rounding ")]
    error = json.loads(line.removeprefix("rounding "))
    assert 0 < error["tiled"] <= 1.2 * error["untiled"]
    assert error["tiled, summed in bf16"] > 1.2 * error["untiled"]


def test_an_output_processor_of_the_script_is_rejected_and_a_model_without_labels_is_megatrons() -> None:
    def original(model: object, labels: object = None, output_processor: object = None) -> object:
        return output_processor

    settings = Settings(make_plan("ring", 2), Flags(loss_tiles=4))
    forward = partial(loss_tiles_hook.run, SimpleNamespace(settings=settings), original)
    processor = forward(None, labels="labels")
    assert (processor.func, processor.args) == (tiled_loss, (4,))
    assert forward(None) is None
    with pytest.raises(WallfacerError, match=r"--wallfacer-loss-tiles: must be left out, because the script passes"):
        forward(None, labels="labels", output_processor=print)
