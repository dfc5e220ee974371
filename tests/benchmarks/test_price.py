"""The choices by price beside the simulator: what the command prints."""

from __future__ import annotations

import pytest

from benchmarks.price import main


def test_one_job_for_each_set_of_heads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cp-size", "4", "--tokens", "4096"]) == 0
    *rows, _, summary = capsys.readouterr().out.splitlines()
    assert rows[2].startswith("| 4 | 4,096 | 32, 8 | ring_outer 4: ")
    assert "| kv_team 4: " in rows[2]
    assert summary.startswith("3 jobs. Time over the fastest: `auto` 1.0")
