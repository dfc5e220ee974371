"""What each rank's attention took, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_wallfacer.engine.totals import total
from megatron_wallfacer.traces.timelines import RankLine


@dataclass(frozen=True)
class Row:
    """One rank, times in seconds.

    Attributes:
        rank: which.
        host: its machine; empty where that is not known.
        passes: of attention, over layers and micro-batches.
        attention_s: in them.
        computing_s: of it, in kernels.
        exposed_s: of it, waiting for a move while nothing was computed.
        exposed_share: of the attention.
    """

    rank: int
    host: str
    passes: int
    attention_s: float
    computing_s: float
    exposed_s: float
    exposed_share: float


def row_of(line: RankLine) -> Row:
    """Of all passes of a time line."""
    found = total(line.events)
    host = line.origin.host if line.origin else ""
    return Row(line.rank, host, **asdict(found), exposed_share=found.exposed_share)


def slowest(rows: Sequence[Row]) -> Row:
    """The rank whose attention took longest."""
    return max(rows, key=lambda row: row.attention_s)


def awaited(rows: Sequence[Row]) -> Row:
    """The rank that waited least: in a step that all end together, it is the one that the others wait for."""
    return min(rows, key=lambda row: row.exposed_s)


def print_rows(rows: Sequence[Row]) -> None:
    """A table, one line a rank, with hosts where there are several; and below it who is slow."""
    from rich.console import Console

    from megatron_wallfacer.cli.table import new_table, print_table

    console = Console()
    hosts = len({row.host for row in rows}) > 1
    headings = ["rank", *(["host"] if hosts else []), "passes", "attention s", "computing s", "exposed s", "exposed"]
    table = new_table(console, *headings, justify="right")
    for row in rows:
        seconds = (f"{value:.4f}" for value in (row.attention_s, row.computing_s, row.exposed_s))
        host = [row.host] if hosts else []
        table.add_row(str(row.rank), *host, str(row.passes), *seconds, f"{row.exposed_share:.1%}")
    print_table(console, table)
    last, least = slowest(rows), awaited(rows)
    mean = sum(row.attention_s for row in rows) / len(rows)
    above = f"{last.attention_s / mean - 1:.1%} above the mean"
    print(f"slowest: rank {last.rank}, {last.attention_s:.4f} s of attention, {above}")
    if len(rows) > 1:
        print(f"waits least, so that others wait for it: rank {least.rank}, {least.exposed_s:.4f} s exposed")


def as_dict(rows: Sequence[Row]) -> dict[str, Any]:
    """For JSON."""
    return {
        "ranks": [asdict(row) for row in rows],
        "slowest": slowest(rows).rank,
        "waits_least": awaited(rows).rank,
    }
