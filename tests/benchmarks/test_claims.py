"""Claims are computed from summaries, and can fail."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.claims import CLAIMS, DOUBLE_RINGS, FEW_HEADS, GRIDS, PEERS, exposed, main, of_bound, speedup

Row = dict[str, str]


def row(scheme: str, median: float | None, bound: float = 1.0) -> Row:
    """A row of a summary; one that could not run has no median."""
    if median is None:
        return {"scheme": scheme, "median_s": "", "bound_s": "", "exposed_s": ""}
    return {"scheme": scheme, "median_s": str(median), "bound_s": str(bound), "exposed_s": str(median - bound)}


ROWS = [
    row("u4-i1-c2-o2", 1.1),
    row("u1-i4-c2-o2", 1.2),
    row("u1-i4-c1-o4", 1.05),
    row("double-ring-2", 1.5),
    row("usp-4", 2.2),
    row("usp-16", None),
    row("wallfacer-2-x", 3.0),
]


def test_speedups_are_of_the_fastest_rows() -> None:
    assert speedup(GRIDS, PEERS)(ROWS) == pytest.approx(2.2 / 1.05)


def test_a_double_ring_is_not_compared_with_itself() -> None:
    assert speedup(FEW_HEADS, DOUBLE_RINGS)(ROWS) == pytest.approx(1.05 / 1.2)


def test_bound_and_exposure() -> None:
    assert of_bound(ROWS) == pytest.approx(1.05)
    assert exposed(ROWS) == pytest.approx(0.05 / 2.0)


def write(directory: Path, rows: list[Row]) -> None:
    for setting in {claim.setting for claim in CLAIMS}:
        (directory / setting).mkdir(parents=True, exist_ok=True)
        with (directory / setting / "summary.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def test_claims_hold_or_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [*ROWS[:2], *ROWS[3:]]
    good[0] = row("u4-i1-c2-o2", 1.02)
    good[1] = row("u1-i4-c2-o2", 1.03)
    write(tmp_path, good)
    assert main([str(tmp_path)]) == 0
    assert "does not hold" not in capsys.readouterr().out
    write(tmp_path, [*good, row("usp-2", 1.0)])
    assert main([str(tmp_path)]) == 1
    assert "**does not hold**" in capsys.readouterr().out


def test_a_setting_without_a_peer_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, [one for one in ROWS if not one["scheme"].startswith("usp")])
    with pytest.raises(SystemExit, match="no row fits rfa"):
        main([str(tmp_path)])
