"""Tables: drawn at a terminal; in a pipe plain columns, one line a row, for grep and awk; or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def show_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of plain words.

    Args:
        headings: of the columns; ``>`` before one sets its column flush right.
        rows: as many words each.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console()
    table = new_table(console, *headings)
    for row in rows:
        # Text, or rich would take what stands in brackets for markup.
        table.add_row(*map(Text, row))
    print_table(console, table)


def as_json(rows: Iterable[object]) -> str:
    """A list of objects with the fields of the rows, which are dataclasses."""
    return json.dumps([asdict(row) for row in rows], indent=2)  # type: ignore[call-overload]


def figure(value: float | None, digits: int = 2) -> str:
    """A number as it stands in a table; a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def new_table(
    console: Console, *headings: str, title: str | None = None, justify: Literal["left", "right"] = "left"
) -> Table:
    """A table without rows, in the manner that fits where it will be printed; ``>`` before a heading: flush right."""
    from rich import box
    from rich.table import Table

    drawn = console.is_terminal
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if drawn else None, pad_edge=drawn)
    for heading in headings:
        side = "right" if heading.startswith(">") else justify
        table.add_column(heading.removeprefix(">"), justify=side, no_wrap=not drawn, overflow="fold")
    return table


def print_table(console: Console, table: Table) -> None:
    """Print it; in a pipe as wide as it is, without blanks at the ends of lines."""
    from rich.console import Console

    if console.is_terminal:
        console.print(table)
        return
    wide = Console(width=10_000, color_system=None)
    with wide.capture() as captured:
        wide.print(table)
    for line in captured.get().splitlines():
        console.out(line.rstrip(), highlight=False)
