"""A rank that is killed in a training over gloo: the others end at once, with an error that says so."""

from __future__ import annotations

import re

import pytest

from tests.megatron.training import arguments
from tests.support.megatron_runs import REPOSITORY, RunResult, train

SCRIPT = REPOSITORY / "tests" / "support" / "killed_once.py"


def killed(place: str, scheme: str) -> RunResult:
    """Four ranks, of which rank 1 is killed in the third step; the others end by themselves."""
    flags = arguments("--wallfacer-cp-size", "4", "--wallfacer-scheme", scheme, iterations=5)
    run = train(4, flags, script=SCRIPT, env={"PLACE": place}, grace_s=30)
    assert run.ranks[1].exit_code == -9
    assert all(rank.end == "ended" and rank.exit_code for rank in run.ranks), run.output[-5000:]
    assert len(run.losses) == 2
    return run


def test_outside_of_attention_the_others_raise_gloos_error() -> None:
    for rank in killed("optimizer", "ring").ranks:
        assert rank.rank == 1 or "RuntimeError: [" in rank.output, rank.output[-3000:]


@pytest.mark.parametrize(("scheme", "axis"), [("ring", "ring_outer"), ("ulysses", "head")])
def test_in_attention_the_others_name_the_rank_that_is_gone(scheme: str, axis: str) -> None:
    causes = set()
    for rank in killed("attention", scheme).ranks:
        if rank.rank != 1:
            (line,) = re.findall(r"^wallfacer: error: .*$", rank.output, flags=re.MULTILINE)
            causes.add(line.partition(f"wallfacer: error: rank {rank.rank}: ")[2])
    (cause,) = causes
    wanted = rf"rank [023] lost its connection to rank 1 \({axis}\) in the forward pass of layer 2: RuntimeError: "
    assert re.match(wanted, cause), cause
