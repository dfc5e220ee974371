"""Print tables: with lines on a terminal, as plain columns into a pipe, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def show_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of text. A heading with a leading ``>`` aligns its column to the right."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    table = new_table(console, *headings)
    for row in rows:
        # rich would read text in brackets as markup.
        table.add_row(*map(Text, row))
    print_table(console, table)


def as_json(rows: Iterable[object]) -> str:
    """Return dataclass objects as a JSON list."""
    return json.dumps([asdict(row) for row in rows], indent=2)  # type: ignore[call-overload]


def new_table(console: Console, *headings: str) -> Table:
    """Return an empty table. A line separates headings and rows, but only on a terminal.

    A heading with a leading ``>`` aligns its column to the right.
    """
    from rich import box
    from rich.table import Table

    at_terminal = console.is_terminal
    style = box.SIMPLE_HEAD if at_terminal else None
    table = Table(title_justify="left", box=style, pad_edge=at_terminal)
    for heading in headings:
        side = "right" if heading.startswith(">") else "left"
        table.add_column(heading.removeprefix(">"), justify=side, no_wrap=not at_terminal, overflow="fold")
    return table


def print_table(console: Console, table: Table) -> None:
    """Print a table. Lines that go into a pipe are not shortened and have no trailing blanks."""
    from rich.console import Console

    if console.is_terminal:
        console.print(table)
        return
    wide = Console(width=10_000, color_system=None)
    with wide.capture() as captured:
        wide.print(table)
    for line in captured.get().splitlines():
        console.out(line.rstrip(), highlight=False)
