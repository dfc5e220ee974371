"""Reports as data: text and tables that a command prints, JSON fields, and the configuration to save."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_wallfacer.errors import OptionError

if TYPE_CHECKING:
    from megatron_wallfacer.planning.configuration import Configuration
    from megatron_wallfacer.planning.grid_table import GridRow


@dataclass(frozen=True)
class Table:
    """A text table. ``>`` before a heading aligns the column to the right."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


ReportPart = str | Table
"""A line of text without its newline, or a table."""


@dataclass(frozen=True)
class Report:
    """The result of ``wallfacer plan``.

    Attributes:
        parts: text and tables in the order of printing, computed when they are read.
        fields: function that returns the result for JSON.
        first: configuration whose flags are saved; None if no configuration fits.
        grid_rows: function that returns the rows of the table of grids, which ``--plot`` draws.
        error: error to raise after the parts are printed, if no configuration fits.
    """

    parts: Iterable[ReportPart]
    fields: Callable[[], Any] = dict
    first: Configuration | None = None
    grid_rows: Callable[[], list[GridRow]] = list
    error: OptionError | None = None


def number(value: float | None, digits: int = 2) -> str:
    """Return a number as text with ``digits`` digits after the decimal point; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"
