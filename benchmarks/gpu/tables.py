"""Tables of rows as files and as markdown; without PyTorch, which takes seconds to import."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

VERDICT = "verdict"
#: Verdicts that do not fail a measurement begin with one of these; an empty one judges nothing.
GOOD = ("ok", "left out", "not measured")
#: A line that ends a traceback, or that the plugin prints.
ERROR = re.compile(r"^(?:\[\w+\]:\s*)?(?:[\w.]*(?:Error|Exception)\b|wallfacer: error)")


def markdown_line(cells: Sequence[object]) -> str:
    """Return one line of a markdown table."""
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def markdown(heading: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a markdown table."""
    return "\n".join(map(markdown_line, (heading, ("---",) * len(heading), *rows)))


def table_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file that :class:`Rows` wrote, by column."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def markdown_table(path: Path) -> str:
    """Return the table of a CSV file that :class:`Rows` wrote, also of one whose last line is cut off."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    return markdown(lines[0], lines[1:]) if lines else ""
