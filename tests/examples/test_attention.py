"""The examples run: the public function is exact on four ranks, a Megatron script trains the same on one and two."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable

import pytest

from tests.docs.pages import ROOT
from tests.support.megatron_runs import train
from tests.support.pool import Pool

RANKS = 4
SCRIPT = ROOT / "examples" / "megatron_script.py"


def largest_difference(rank: int, name: str) -> float:
    """Run an example's ``main`` on one rank."""
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"](rank, RANKS)


@pytest.mark.parametrize("name", ["plain_pytorch", "packed_documents", "window_and_sinks"])
def test_an_example_is_exact(pools: Callable[[int], Pool], name: str) -> None:
    assert max(pools(RANKS).run(largest_difference, name)) < 1e-12


def test_a_megatron_script_has_the_same_losses_on_two_ranks() -> None:
    command = (ROOT / "examples" / "megatron_script.py").read_text().partition(".py --wallfacer-cp-size 2")[2]
    flags = command.partition('"""')[0].replace("\\", " ").split()
    runs = [train(ranks, ["--wallfacer-cp-size", str(ranks), *flags], script=SCRIPT).check() for ranks in (1, 2)]
    one, two = ([float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", run.output)] for run in runs)
    assert len(one) == 5
    assert two == pytest.approx(one, rel=1e-5)
    assert "ring_outer 2" in runs[1].output


def test_a_grid_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "plan_a_grid.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["auto", "ring", "double-ring", "usp", "wallfacer"]
    ring, least = (float(line.partition("volume")[2].split()[0]) for line in (lines[1], lines[0]))
    assert ring == 7.5
    assert least < ring
