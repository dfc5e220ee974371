"""The rows of docs/reliability.md, by section. Each names the committed tests that check it.

Add a row: append it in the module of its section, then ``python -m tests.faults --write`` writes it into the page.
"""

from __future__ import annotations

from tests.faults import files, losses, ranks, values

SECTIONS = {
    "Ranks that fail, wait or disagree": ranks.ROWS,
    "Arguments and data": values.ROWS,
    "Losses": losses.ROWS,
    "Files, signals, restarts": files.ROWS,
}
ROWS = tuple(row for rows in SECTIONS.values() for row in rows)
