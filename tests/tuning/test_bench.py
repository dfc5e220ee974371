"""``wallfacer bench``: its results, its errors, and one run on CPU ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_wallfacer.cli.main import main
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape
from megatron_wallfacer.tuning.attention_times import AttentionWorkload, PassTimes, _difference
from megatron_wallfacer.tuning.scheme_times import as_csv, scheme_times

ROOT = Path(__file__).resolve().parents[2]


def test_on_two_ranks() -> None:
    flags = "--schemes ring all-gather --seq 64 --q-heads 2 --kv-heads 1 --head-dim 8 --repeats 1 --dtype fp32 --json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "megatron_wallfacer.cli.main", "bench", *flags.split()),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    ring, gathered = json.loads(done.stdout)
    assert (ring["scheme"], gathered["grid"]) == ("ring", "kv_team 2")
    assert ring["ratio"] == 1
    assert ring["difference"] == 0
    assert 0 <= gathered["difference"] <= gathered["tolerance"]
    assert gathered["fastest_ms"] <= gathered["median_ms"] <= gathered["slowest_ms"]


def test_results() -> None:
    plans = [make_plan(scheme, 4) for scheme in ("ring", "team-ring")]
    times = [
        [PassTimes(1, 2), PassTimes(1, 1), PassTimes(2, 3)],
        [PassTimes(1, 5), PassTimes(2, 4), PassTimes(3, 3)],
    ]
    workload = AttentionWorkload(Shape(8, 2, 1, 4), torch.float32, torch.device("cpu"))
    first, second = scheme_times(("ring", "team-ring"), plans, times, (0.0, 1.0), workload)
    assert (first.median_ms, first.fastest_ms, first.slowest_ms, first.forward_ms) == (3000, 2000, 5000, 1000)
    assert (second.ratio, second.tokens_s) == (2, 32 / 6)
    # Of 32 x 32 / 2 pairs a rank has a quarter: 14 operations for each of 2 heads and 4 channels.
    assert first.tflops == pytest.approx(14 * 128 * 2 * 4 / 3 / 1e12)
    assert (first.agrees, second.agrees) == (True, False)
    assert len(as_csv([first, second]).splitlines()) == 3


def test_a_nan_is_no_agreement() -> None:
    assert _difference(torch.tensor([float("nan"), 1.0]), torch.ones(2)) == float("inf")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seq 100", "seq=100: must be a multiple of 2 x 4 ranks"),
        ("--q-heads 3", "kv_heads=2: must be a divisor of 3 query heads"),
        ("--repeats 0", "repeats=0: must be a positive number"),
        ("--schemes ulysses --q-heads 2 --kv-heads 1", "--schemes ulysses: head_size=4: must be"),
    ],
)
def test_errors_come_before_the_process_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: str, message: str
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["bench", *flags.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"wallfacer: error: {message}")
    assert said.count("\n") == 1


def test_it_has_to_be_under_torchrun(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["bench"]) == 2
    assert "bench: must run under torchrun" in capsys.readouterr().err
