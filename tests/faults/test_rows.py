"""The page has the rows, and each row has tests that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.__main__ import Outcomes
from tests.faults.row import NOT_TRIED, Row
from tests.faults.rows import ROWS
from tests.faults.table import tables, written

ROOT = Path(__file__).parents[2]


def test_the_page_has_every_row() -> None:
    assert written() == tables(), "python -m tests.faults --write"


def test_faults_are_named_once() -> None:
    assert len({row.fault for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fault)
def test_each_row_names_tests_that_exist(row: Row) -> None:
    for test in row.tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), test
        assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text(), test


@pytest.mark.parametrize(
    ("ends", "end"),
    [
        ({"a.py::f[1]": "passed", "a.py::f[2]": "skipped"}, "ok"),
        ({"a.py::f[1]": "passed", "a.py::f[2]": "failed"}, "FAILED"),
        ({"a.py::f[1]": "skipped"}, "skipped"),
        ({"a.py::longer": "passed"}, "FAILED"),  # the row's own test was not run
        ({}, "FAILED"),
    ],
)
def test_the_outcome_of_a_row(ends: dict[str, str], end: str) -> None:
    outcomes = Outcomes()
    outcomes.by_test = ends
    assert outcomes.of(Row("", "", "", "", "", "", ("a.py::f",))) == end
    assert outcomes.of(Row("", "", "", "", "", "", NOT_TRIED)) == "not tried"
