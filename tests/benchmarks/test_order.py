"""The order of simulated and measured schemes: input, comparison and output."""

from __future__ import annotations

import pytest

from benchmarks.order import ROOT, SettingResult, lines, main, measured
from benchmarks.predict import Prediction


def setting(*times: tuple[float, float]) -> SettingResult:
    """Schemes by (measured, simulated) seconds; the first has the least volume."""
    return SettingResult("x", [Prediction(f"s{n}", *pair, volume=float(n)) for n, pair in enumerate(times)])


def test_the_committed_tables_are_read() -> None:
    found = measured()
    assert len(found) == 10
    assert found["c-4x4"]["u2-i2-c2-o2"] == 1.558
    assert set(found["c-4x2"]) == {"u1-i2-c2-o2", "u2-i1-c2-o2", "usp-2", "usp-4", "rfa-zigzag"}


def test_a_pair_in_the_wrong_order_is_counted_and_printed() -> None:
    one = setting((1.0, 1.0), (1.04, 0.9), (1.2, 0.95))
    assert [(a.scheme, b.scheme) for a, b in one.pairs] == [("s0", "s2"), ("s1", "s2")]
    assert [(a.scheme, b.scheme) for a, b in one.wrong] == [("s0", "s2")]
    printed = [*lines([one])]
    assert "x: s0 before s2: measured 1.000 and 1.200 s, simulated 1.000 and 0.950 s" in printed
    assert "1 of 2 pairs are in order." in printed


def test_a_slow_choice_fails() -> None:
    assert setting((1.0, 1.0), (1.2, 1.3)).holds
    slow = setting((1.0, 1.0), (1.04, 0.9))
    assert slow.choice == 1.04
    assert not slow.holds


def test_a_small_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--settings", "c-2x4", "--draws", "1"]) == 0
    assert "| `c-2x4` | 3 | 1.0" in capsys.readouterr().out


def test_committed_runs_are_predicted_with_their_own_processor_costs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--runs", str(ROOT / "docs/data/emulated-2026-11-28/nic50-4x4"), "--draws", "1"])
    assert "| `nic50-4x4` | 4 | 1.019 | 5 |" in capsys.readouterr().out
