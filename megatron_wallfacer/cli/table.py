"""Tables: drawn at a terminal; in a pipe plain columns, one line a row, for grep and awk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def new_table(
    console: Console, *headings: str, title: str | None = None, justify: Literal["left", "right"] = "left"
) -> Table:
    """A table without rows, in the manner that fits where it will be printed."""
    from rich import box
    from rich.table import Table

    drawn = console.is_terminal
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if drawn else None, pad_edge=drawn)
    for heading in headings:
        table.add_column(heading, justify=justify, no_wrap=not drawn, overflow="fold")
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
