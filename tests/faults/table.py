"""The tables of docs/reliability.md, made of the rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.faults.row import Row
from tests.faults.rows import SECTIONS

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- rows of tests/faults/rows.py -->", "<!-- end of rows -->"
HEADINGS = ("fault", "what happens", "time to notice", "shortened by", "message", "what is lost", "checked by")


def tables() -> str:
    """Return all sections that have rows, each a heading and a table in Markdown."""
    return "\n\n".join(f"## {heading}\n\n{_table(rows)}" for heading, rows in SECTIONS.items() if rows)


def _table(rows: Iterable[Row]) -> str:
    lines = [HEADINGS, ("---",) * len(HEADINGS), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written() -> str:
    """Return the tables that the page has."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def write() -> None:
    """Write the tables into the page."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}")


def _cells(row: Row) -> tuple[str, ...]:
    files = dict.fromkeys(test.partition("::")[0].removeprefix("tests/") for test in row.tests)
    checked = ", ".join(f"`{file}`" for file in files) or "not tried"
    return row.fault, row.happens, row.noticed, row.variable, row.message, row.lost, checked
