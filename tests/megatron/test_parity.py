"""Training with context parallelism gives the losses and gradient norms of training without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_wallfacer.schedule.schemes import SCHEMES
from tests.megatron.training import (
    GRAD_NORM_TOLERANCE,
    LOSS_TOLERANCE,
    arguments,
    baseline,
    differences,
    largest_differences,
)
from tests.support.megatron_runs import RunResult, train

WRONG_MASK = Path(__file__).resolve().parents[1] / "support" / "wrong_mask.py"


@pytest.mark.parametrize("scheme", ["wallfacer", "team-ring", "ring"])
@pytest.mark.parametrize("cp_size", [2, 4, 8])
def test_scheme_and_size(cp_size: int, scheme: str) -> None:
    run = train(
        cp_size, arguments("--wallfacer-cp-size", str(cp_size), "--wallfacer-scheme", scheme, *TEAM[scheme, cp_size])
    )
    loss, grad_norm = differences(run.check(), baseline())
    assert loss <= LOSS_TOLERANCE
    assert grad_norm <= GRAD_NORM_TOLERANCE


#: Where a scheme could be tested with a team of one, it is tested with a real one.
TEAM = {
    ("wallfacer", 2): (),
    ("wallfacer", 4): ("--wallfacer-team-size", "2"),
    ("wallfacer", 8): ("--wallfacer-team-size", "2"),
    ("team-ring", 2): ("--wallfacer-team-size", "2"),
    ("team-ring", 4): ("--wallfacer-team-size", "2"),
    ("team-ring", 8): ("--wallfacer-team-size", "2", "--wallfacer-placement", "rings-adjacent"),
    ("ring", 2): (),
    ("ring", 4): (),
    ("ring", 8): (),
}


#: A few iterations of everything else, each where it is at its most: several ranks on each of its axes, fewer kv heads
#: than ranks that divide them.
FEW = 4
OTHERS = {
    "auto": (4, ""),
    "wallfacer --wallfacer-kv-order permuted": (8, "--wallfacer-team-size 2 --wallfacer-head-groups 2"),
    "team-ring --wallfacer-head-size 2": (
        8,
        "--wallfacer-team-size 2 --wallfacer-kv-team-size 2 --wallfacer-forward pass-q --wallfacer-head-groups 2",
    ),
    "ring --wallfacer-bidirectional": (4, ""),
    "double-ring": (8, ""),
    "ulysses": (4, "--wallfacer-head-groups 1"),
    "usp": (8, "--wallfacer-head-size 4 --wallfacer-placement ring-first --wallfacer-head-groups 2"),
    "loongtrain": (8, "--wallfacer-head-size 2 --wallfacer-head-groups 2"),
    "mesh": (4, "--wallfacer-head-groups 2"),
    "all-gather": (4, ""),
    "tokenring": (4, ""),
    "burst": (8, ""),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_scheme(name: str) -> None:
    cp_size, flags = OTHERS[name]
    split = ("--wallfacer-cp-size", str(cp_size), "--wallfacer-scheme", *name.split(), *flags.split())
    check_few(train(cp_size, arguments(*split, iterations=FEW)))


def test_the_lss_transformers_averaging_is_megatrons() -> None:
    """It averages a rank's gradients over all that have the parameters; Megatron's data-parallel group with the
    context-parallel ranks in it does, so that losses and gradient norms are those of one rank."""
    flags = ("--wallfacer-cp-size", "2", "--wallfacer-scheme", "lss")
    run = train(4, arguments(*flags, iterations=FEW))  # twice data parallel
    check_few(run)
    assert "kv_team 2" in run.output


def check_few(run: RunResult) -> None:
    """Equal to a run of as many iterations on one rank."""
    assert len(run.check().iterations) == FEW
    loss, grad_norm = largest_differences(run, baseline("--train-iters", str(FEW)))
    assert loss <= LOSS_TOLERANCE
    assert grad_norm <= GRAD_NORM_TOLERANCE


def test_no_scheme_is_left_out() -> None:
    tested = {name.split()[0] for name in OTHERS} | {scheme for scheme, _ in TEAM} | {"lss"}
    assert tested == set(SCHEMES)


def test_with_tensor_and_pipeline_parallelism() -> None:
    layout = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    run = train(8, arguments(*layout, "--wallfacer-cp-size", "2", "--wallfacer-team-size", "2")).check()
    loss, grad_norm = differences(run, baseline(*layout, ranks=4))
    assert loss <= LOSS_TOLERANCE
    assert grad_norm <= GRAD_NORM_TOLERANCE
    assert "wallfacer: 2 of 2 attention layers" in run.output


def test_with_data_parallelism() -> None:
    run = train(8, arguments("--wallfacer-cp-size", "4", "--wallfacer-team-size", "2")).check()
    loss, grad_norm = differences(run, baseline())
    assert loss <= LOSS_TOLERANCE
    assert grad_norm <= GRAD_NORM_TOLERANCE


def test_a_wrong_mask_fails_the_same_comparison() -> None:
    """Negative control: the diagonal tiles without their causal triangle."""
    run = train(2, arguments("--wallfacer-cp-size", "2"), script=WRONG_MASK).check()
    loss, _ = differences(run, baseline())
    assert loss > 100 * LOSS_TOLERANCE


def test_a_run_prints_what_it_does() -> None:
    flags = ("--wallfacer-cp-size", "4", "--wallfacer-scheme", "wallfacer", "--wallfacer-team-size", "2")
    flags = (*flags, "--wallfacer-head-groups", "2")
    output = train(4, arguments(*flags, iterations=1)).check().ranks[0].output
    block = [line.removeprefix("wallfacer: ") for line in output.splitlines() if line.startswith("wallfacer: ")]
    text = "\n".join(block)
    for part in (
        "no CUDA here: 4 ranks on the CPU over gloo",
        "megatron-wallfacer 0.1.0",
        "core attention, local",
        "scheme     The scheme is wallfacer, with K and V in the order paper.",
        "grid       The grid of 4 context-parallel ranks is team 2 x kv_team 2.",
        "placement  The axes vary in this order, fastest first: team, kv_team.",
        "nodes      All context-parallel ranks are on one node.",
        "groups     The rank is in 5 process groups: cp (4 ranks), team inputs (2 ranks), team results (2 ranks)",
        "heads      Each rank has 4 query heads and 2 kv heads, in 2 head groups.",
        "kernel     The kernel torch computes attention on cpu.",
        "dtype      Inputs are float32",
        "forward    81 KiB in 8",
        " messages are received per rank and layer, ",
        "x the lower bound.",
        "Buffers take up to ",
        "2 of 2 attention layers",
    ):
        assert part in text
