"""--wallfacer-verify-every: the steps that are verified, and a training run that stops where a bit was flipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.verified import VerifiedSteps
from tests.megatron.test_arguments import Parse, parse  # noqa: F401
from tests.megatron.test_core_attention import build
from tests.megatron.training import arguments
from tests.support.megatron_runs import train

SUPPORT = Path(__file__).resolve().parents[1] / "support"
FLIPPED_BIT, NOT_FINITE = SUPPORT / "flipped_bit.py", SUPPORT / "not_finite.py"


def test_a_flipped_bit_stops_every_rank_in_the_verified_step() -> None:
    flags = ("--wallfacer-cp-size", "2", "--wallfacer-scheme", "ring", "--wallfacer-verify-every", "2")
    run = train(2, arguments(*flags, iterations=3), script=FLIPPED_BIT)
    message = "forward pass of layer 1: k of rank 0 arrived changed at rank 1 (ring_outer)"
    for rank in run.ranks:
        assert rank.exit_code != 0
        assert f"wallfacer: error: rank {rank.rank}: {message}" in rank.output, rank.output[-3000:]
    # The first step is not verified.
    assert len(run.losses) == 1


def test_a_rank_whose_own_value_is_nan_is_named_on_every_rank() -> None:
    """The NaN reaches all ranks within the layer: only the comparison before the first message tells whose it is."""
    flags = ("--wallfacer-cp-size", "4", "--wallfacer-scheme", "team-ring", "--wallfacer-verify-every", "1")
    run = train(4, arguments(*flags, iterations=3), script=NOT_FINITE, env={"TENSOR": "value"})
    message = "forward pass of layer 2: v of rank 2 has values that are not finite"
    for rank in run.ranks:
        assert (rank.exit_code, rank.end) == (2, "ended"), rank.output[-3000:]
        assert f"wallfacer: error: rank {rank.rank}: {message}" in rank.output, rank.output[-3000:]
    assert len(run.losses) == 1


@pytest.mark.parametrize(("every", "verified"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4]), (3, [3]), (9, [])])
def test_every_nth_step_is_verified(every: int, verified: list[int]) -> None:
    steps, weight, found = VerifiedSteps(every), nn.Parameter(torch.ones(1)), []
    # Of two optimizers in one step the second counts no step.
    optimizers = [torch.optim.SGD([weight], lr=0.1) for _ in range(2)]
    weight.grad = torch.ones(1)
    for step in range(1, 6):
        due = {steps.due() for _ in range(3)}
        assert len(due) == 1
        found += [step] if due == {True} else []
        for optimizer in optimizers:
            optimizer.step()
    assert found == verified


def test_steps_without_attention_are_not_counted() -> None:
    steps, weight = VerifiedSteps(2), nn.Parameter(torch.ones(1))
    torch.optim.SGD([weight], lr=0.1).step()
    assert not steps.due()


@pytest.mark.parametrize("every", [0, -1])
def test_a_number_that_is_not_positive_is_an_error(parse: Parse, every: int) -> None:  # noqa: F811
    with pytest.raises(WallfacerError, match=f"--wallfacer-verify-every {every}: must be a positive number of steps"):
        parse("--wallfacer-cp-size", "2", f"--wallfacer-verify-every={every}")


def test_a_layer_verifies_in_training_only_and_only_where_asked_to() -> None:
    layer = build()
    assert layer._verified is None
    assert layer._call_now() is layer._call
    layer = build(verify_every=1)
    assert layer._call_now() is layer._verified
    assert layer._verified.verify
    layer.eval()
    assert not layer._call_now().verify
