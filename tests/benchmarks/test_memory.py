"""The inventory is what Megatron's model holds, counted operator by operator; a buffer left out is noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory.__main__ import within_tolerance
from benchmarks.memory.live import Peak
from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.inventory import MOMENTS, Activations, bytes_at, inventory, peak
from megatron_wallfacer.planning.model import MODELS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("words", "last"),
    [("--check 2", "0 of 2 configurations"), ("--ranks 3", "0 of 3 steps")],
    ids=["full size, one rank", "four gloo ranks"],
)
def test_the_inventory_is_what_is_counted(words: str, last: str) -> None:
    command = [sys.executable, "-m", "benchmarks.memory", *words.split()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert f"{last} are out of tolerance" in run.stdout


@pytest.mark.parametrize("moment", ["head", "mlp", "attention"])
def test_a_buffer_left_out_is_noticed(moment: str) -> None:
    """Of the largest at each moment; the count is the whole inventory."""
    tiles = {"head": 1, "mlp": 128, "attention": 128}[moment]
    attention = 8e9 if moment == "attention" else 0.0
    work = Activations(
        MODELS["llama3-8b"],
        131072,
        layers=2,
        loss_tiles=tiles,
        mlp_tiles=16 if moment == "attention" else 1,
        attention=AttentionMemory(backward=attention),
    )
    buffers = inventory(work)
    assert peak(buffers)[0] == moment
    counted = {name: Peak(int(bytes_at(buffers, name))) for name in MOMENTS}
    largest = max((one for one in buffers if moment in one.moments), key=lambda one: one.nbytes)
    for left_out, good in ((None, True), (largest, False)):
        listed = [one for one in buffers if one is not left_out]
        assert within_tolerance({name: (counted[name], bytes_at(listed, name)) for name in MOMENTS}) == good
