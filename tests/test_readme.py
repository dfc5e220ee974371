"""The README is short and true: its example is part of a file that runs, its output is what commands print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_wallfacer.cli.main import main
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import forward_schedule
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape, received_bytes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLE = ROOT / "examples" / "plain_pytorch.py"
#: Commands with what they print; a line ``...`` stands for lines that are left out.
SHOWN = re.findall(r"^```text\n\$ wallfacer (.*)\n([^`]*)```$", README, re.MULTILINE)


def test_it_is_short() -> None:
    assert len(README.split()) <= 1100
    assert len(README.splitlines()) <= 120


def test_the_plain_pytorch_example_is_exact() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(EXAMPLE)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"rank \d: largest difference from dense attention (\d\.\de[+-]\d\d)", done.stdout)
    assert len(differences) == 4
    assert max(map(float, differences)) < 1e-12


def test_the_function_call_is_that_of_the_example() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.strip() for line in EXAMPLE.read_text().splitlines()]
    assert all(line in lines for line in shown.splitlines()), shown


def test_there_is_a_plan() -> None:
    assert [command.split()[0] for command, _ in SHOWN] == ["plan"]


@pytest.mark.parametrize(("command", "expected"), SHOWN, ids=[command for command, _ in SHOWN])
def test_a_command_prints_what_is_shown(command: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(command)) == 0
    parts = [part.strip("\n") for part in expected.split("\n...\n")]
    printed = capsys.readouterr().out
    assert all(f"\n{part}\n" in f"\n{printed}" for part in parts), printed
    places = [printed.index(part) for part in parts]
    assert places == sorted(places)


def test_the_test_command_is_that_of_continuous_integration() -> None:
    assert "    make test " in README
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec make --no-print-directory test"


def test_every_file_that_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_bytes_of_the_idea_are_those_of_the_schedules() -> None:
    shape = Shape(tokens=2**20 // 64, q_heads=32, kv_heads=8, head_dim=128)
    grids = Grid(team=4, ring_outer=16), Grid(ring_outer=64)
    assert make_plan("auto", 64, q_heads=32, kv_heads=8, tokens=shape.tokens).grid == grids[0]
    ours, ring = (received_bytes(forward_schedule(Plan(grid), 0), shape).total() / 2**30 for grid in grids)
    assert f"{ours:.1f} GiB per layer in forward instead of a ring's {ring:.1f} GiB" in README
