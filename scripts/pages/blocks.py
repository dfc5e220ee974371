"""Generated blocks of a page: a comment that says what follows, and the fenced block that is generated from it.

``<!-- schedule: team=2 ring_outer=2, rank 1, forward -->`` stands before the schedule of rank 1 on that grid.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_wallfacer.schedule.grid import Grid
from scripts.pages.schedules import schedule_text

DOCS = Path(__file__).parents[2] / "docs"
#: Pages that have generated blocks.
PAGES = (DOCS / "walkthrough.md",)
_HEAD = r"(<!-- schedule: ([\w= ]+), rank (\d+), (forward|backward) -->\n```text\n)"
_BLOCK = re.compile(_HEAD + r".*?(?=^```$)", re.MULTILINE | re.DOTALL)


def regenerated(text: str) -> str:
    """Return the text of a page with each of its generated blocks written anew.

    Raises:
        ValueError: the page has no generated block.
    """
    if not _BLOCK.search(text):
        raise ValueError("no block follows a comment such as <!-- schedule: team=2, rank 0, forward -->")
    return _BLOCK.sub(_block, text)


def _block(match: re.Match[str]) -> str:
    head, axes, rank, direction = match.groups()
    sizes = {name: int(size) for name, size in (axis.split("=") for axis in axes.split())}
    return f"{head}{schedule_text(Grid(**sizes), int(rank), backward=direction == 'backward')}\n"
