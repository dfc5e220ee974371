"""The cost of verified steps, for small tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import verify


def test_each_scheme_has_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verify, "SHAPE", replace(verify.SHAPE, tokens=2, head_dim=8))
    verify.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0].removeprefix("| ") for row in rows[2:]] == list(verify.SCHEMES)
    # The ring sends K and V 7 times, then K, V and their gradients: both ends, of the busiest rank.
    assert rows[2][1] == "84"
