"""The examples of the public function are exact on four ranks."""

from __future__ import annotations

import runpy
from collections.abc import Callable

import pytest

from tests.docs.pages import ROOT
from tests.support.pool import Pool

RANKS = 4


def largest_difference(rank: int, name: str) -> float:
    """Run an example's ``main`` on one rank."""
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"](rank, RANKS)


@pytest.mark.parametrize("name", ["plain_pytorch", "packed_documents"])
def test_an_example_is_exact(pools: Callable[[int], Pool], name: str) -> None:
    assert max(pools(RANKS).run(largest_difference, name)) < 1e-12


def test_a_grid_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "plan_a_grid.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["auto", "ring", "double-ring", "usp", "wallfacer"]
    ring, least = (float(line.partition("volume")[2].split()[0]) for line in (lines[1], lines[0]))
    assert ring == 7.5
    assert least < ring
