"""Grids of attention in one configuration: the best and the named schemes, with the reason for each time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_wallfacer.cli.table import figure, show_table
from megatron_wallfacer.schedule.grid import AXES

if TYPE_CHECKING:
    from megatron_wallfacer.planning.configuration import Configuration
    from megatron_wallfacer.planning.search import Choice, Found, Job

#: Rows of the table.
BEST = 10


@dataclass(frozen=True)
class Row:
    """A line of the table. Times of one attention layer, forward and backward.

    Attributes:
        name: of a scheme, or empty.
        grid, placement, riders, q_kept: the plan.
        seconds: played; None where that would take long.
        bound_s: below which no overlap can bring it.
        buffers_gb: of attention: buffers and results.
        tokens_s, mfu, memory_gb: of a whole step.
        reason: what its time is made of.
    """

    name: str
    grid: str
    placement: tuple[str, ...]
    riders: tuple[str, str]
    q_kept: bool
    seconds: float | None
    bound_s: float
    buffers_gb: float | None
    tokens_s: float | None
    mfu: float | None
    memory_gb: float | None
    reason: str


def grid_rows(found: Found, configuration: Configuration) -> tuple[list[Row], list[Row]]:
    """Return the best grids that were simulated, each in its best placement, and the named schemes.

    Args:
        found: of the search.
        configuration: sizes and flags around attention.
    """
    from megatron_wallfacer.planning.search import named

    best = [_row(configuration, one) for one in _in_best_placement(found)[:BEST]]
    return best, [_row(configuration, one) for one in named(configuration.choice.job)]


def show_grids(rows: Iterable[Row]) -> None:
    """One line a row; grids that were found have no name."""
    headings = ("scheme", "grid", ">ms", ">bound", ">MFU %", ">buffers GB", "why", "nearest first")
    lines = (
        (
            row.name or "-",
            row.grid,
            figure(None if row.seconds is None else 1000.0 * row.seconds),
            figure(1000.0 * row.bound_s),
            figure(None if row.mfu is None else 100 * row.mfu, 1),
            figure(row.buffers_gb),
            row.reason,
            ", ".join(row.placement),
        )
        for row in rows
    )
    show_table(headings, lines)


def _in_best_placement(found: Found) -> list[Choice]:
    """One choice of each grid, in its best placement."""
    first: dict[tuple[int, ...], Choice] = {}
    for choice in found.best:
        first.setdefault(tuple(choice.plan.grid.size_of(axis) for axis in AXES), choice)
    return list(first.values())


def _row(configuration: Configuration, choice: Choice) -> Row:
    plan, bound = choice.plan, choice.bound
    common = {
        "name": choice.name or "",
        "grid": str(plan.grid),
        "placement": plan.grid.placement,
        "riders": (plan.forward, plan.backward),
        "q_kept": choice.q_kept,
        "bound_s": bound.seconds,
    }
    if not choice.can_be_played:
        nothing = dict.fromkeys(("seconds", "buffers_gb", "tokens_s", "mfu", "memory_gb"))
        return Row(**common, **nothing, reason=f"not played: too many ranks; bound by {bound.by}")
    whole = replace(configuration, choice=choice).step
    return Row(
        **common,
        seconds=choice.played.seconds,
        buffers_gb=choice.buffer_bytes / 1e9,
        tokens_s=whole.tokens_s,
        mfu=whole.mfu,
        memory_gb=whole.memory_gb,
        reason=_reason(choice),
    )


def _reason(choice: Choice) -> str:
    """Bound by what, how far from that, and from compute."""
    played, bound = choice.played, choice.bound
    from_compute = f"{played.seconds / bound.kernel_s:.2f}x compute"
    if bound.by == "compute":
        return from_compute
    return f"{bound.by}, {played.seconds / bound.seconds:.2f}x; {from_compute}"


def grids_summary(found: Found, job: Job) -> str:
    """Return one line: how many grids were simulated, and why the first is the first."""
    from megatron_wallfacer.planning.search import TIE
    from megatron_wallfacer.schedule.bounds import backward_bound, forward_bound

    best = found.best[0]
    least = forward_bound(job.cp_size, job.shape.kappa) + backward_bound(job.cp_size, job.shape.kappa)
    ratio = f", {best.words / least:.2f}x the least for undivided heads" if least else ""
    large = f", {found.too_large} did not fit the memory" if found.too_large else ""
    return (
        f"{len(found.best)} of {found.legal} grids and placements played{large}; "
        f"the first moves the fewest words of those within {TIE - 1:.0%} of the fastest: "
        f"{best.words:.2f} to a rank in units of n*H{ratio}"
    )
