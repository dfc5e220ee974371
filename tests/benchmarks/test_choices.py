"""The tables of choices and simulated times."""

from __future__ import annotations

import json

import pytest

from benchmarks import choices


def test_both_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What `wallfacer plan` finds is tested in tests/cli/test_plan.py."""
    best = {"grid": "ring_outer 2", "seconds": 0.0125, "buffers_gb": 0.5}
    monkeypatch.setattr(choices, "wallfacer", lambda _: print(json.dumps({"best": [best]})))
    monkeypatch.setattr(choices, "SCHEMES", ((4, 4096, {"scheme": "ring"}),))
    assert choices.main([]) == 0
    printed = capsys.readouterr().out
    assert "| h200-8x8 | 1M | ring_outer 2 | 12.50 | 0.50 GB |" in printed
    assert "| 4 | 4,096 | ring, ring_outer 4 | 4 / 4 | 5." in printed
