"""Generated blocks of a page: a comment that names what follows, and the text that is generated from it.

``<!-- schedule: team=2 ring_outer=2, rank 1, forward -->`` stands before the schedule of rank 1 on that grid, and
``<!-- rows of unsupported combinations: call -->`` before the rows of a table of :data:`TABLES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_wallfacer.schedule.grid import Grid
from scripts.pages.flags import flag_rows
from scripts.pages.hooks import hook_rows
from scripts.pages.kernels import kernel_rows
from scripts.pages.schedules import schedule_text
from scripts.pages.unsupported import combination_rows

DOCS = Path(__file__).parents[2] / "docs"
#: Pages that have generated blocks.
PAGES = tuple(DOCS / f"{name}.md" for name in ("walkthrough", "unsupported", "kernels", "flags", "design"))
#: Rows of a table by the name in the comment before them.
TABLES: dict[str, Callable[[], str]] = {
    f"unsupported combinations: {when}": partial(combination_rows, when) for when in ("parse", "model", "call")
} | {"flags": flag_rows, "hooks": hook_rows, "kernels": kernel_rows}
_SCHEDULE = re.compile(
    r"(<!-- schedule: ([\w= ]+), rank (\d+), (forward|backward) -->\n```text\n).*?(?=^```$)", re.MULTILINE | re.DOTALL
)
_ROWS = re.compile(r"(<!-- rows of ([\w ]+(?:: \w+)?) -->\n).*?(?=<!-- end of rows -->$)", re.MULTILINE | re.DOTALL)


def regenerated(text: str) -> str:
    """Return the text of a page with each of its generated blocks written anew.

    Raises:
        ValueError: the page has no generated block.
    """
    text, schedules = _SCHEDULE.subn(_schedule, text)
    text, tables = _ROWS.subn(lambda match: f"{match[1]}{TABLES[match[2]]()}\n", text)
    if schedules + tables == 0:
        raise ValueError("no block follows a comment such as <!-- schedule: team=2, rank 0, forward -->")
    return text


def _schedule(match: re.Match[str]) -> str:
    head, axes, rank, direction = match.groups()
    sizes = {name: int(size) for name, size in (axis.split("=") for axis in axes.split())}
    return f"{head}{schedule_text(Grid(**sizes), int(rank), backward=direction == 'backward')}\n"
