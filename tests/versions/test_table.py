"""The support table is read back as it was written, and what differs from it is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scripts.versions.table import Row, difference, markdown, mismatches, read, row
from scripts.versions.wheels import WHEELS

DOCUMENT = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
FINE = {"version": "0.19.2", "hook groups": "ok", "groups": "ok", "layers": "ok", "loss": 0.0, "gradients": 1e-7}
OURS = Row("0.19.2", "wheel", "ok", "ok", "ok", "ok")


def test_the_document_names_the_wheels_that_are_tried() -> None:
    assert [row.megatron for row in read(DOCUMENT) if row.source == "wheel"] == list(WHEELS)


def test_a_table_is_read_back_as_it_was_written() -> None:
    rows = [OURS, replace(OURS, source="checkout", loop="differs by 1.0e-02")]
    assert read(f"before\n{markdown(rows)}\nafter") == rows


def test_a_document_without_a_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no table"):
        read("| 0.19.2 | wheel |")


@pytest.mark.parametrize(
    ("changes", "cells"),
    [
        ({}, {}),
        ({"gradients": 1e-3}, {"model": "gradients differs by 1.0e-03"}),
        ({"loss": float("nan")}, {"model": "loss differs by nan"}),
        ({"layers": "1 of 2"}, {"groups": "1 of 2"}),
        ({"hook groups": "WallfacerError: gone"}, {"hooks": "hook groups: WallfacerError: gone"}),
        ({"hook arguments": "no megatron.training in the wheel"}, {"hooks": "ok, 1 of 2"}),
        ({"model": "TypeError: x"}, {"groups": "TypeError: x", "model": "TypeError: x"}),
    ],
)
def test_findings_become_cells(changes: dict[str, str | float], cells: dict[str, str]) -> None:
    assert row("wheel", FINE | changes, "ok") == replace(OURS, **cells)


def test_a_difference_within_the_tolerance_is_ok() -> None:
    assert (difference(1e-6), difference(2e-5)) == ("ok", "differs by 2.0e-05")


def test_what_differs_is_said_and_checkouts_that_were_not_given_are_not_missed() -> None:
    other, checkout = replace(OURS, megatron="0.18.2"), replace(OURS, source="checkout")
    assert mismatches([OURS], [OURS, checkout]) == []
    assert len(mismatches([OURS], [OURS, other])) == 1
    assert len(mismatches([replace(OURS, loop="differs by 1.0e-02")], [OURS])) == 1
    assert len(mismatches([OURS, checkout], [OURS])) == 1
