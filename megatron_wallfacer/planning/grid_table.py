"""Tables of attention grids: the best grids and the named schemes, and the resource that limits each grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.configuration import Configuration
from megatron_wallfacer.planning.report import Table, number
from megatron_wallfacer.planning.search import TIE, SearchResult, named_choices
from megatron_wallfacer.schedule.grid import AXES
from megatron_wallfacer.schedule.plan import RingVariant
from megatron_wallfacer.schedule.volume_bounds import backward_bound, forward_bound

#: Number of simulated grids in the table.
BEST = 10


@dataclass(frozen=True)
class GridRow:
    """A grid with the time of one attention layer, forward and backward, in seconds, and memory in 1e9 bytes per rank.

    Attributes:
        name: name of the scheme; empty for a grid that the search has found.
        grid: axes with their sizes.
        placement: axes, fastest varying first.
        ring_variants: ring variants (pass-KV or pass-Q) of the forward and of the backward pass.
        keep_gathered_q: whether gathered queries are kept from forward to backward.
        seconds: simulated time; None if a simulation would take long.
        bound_s: lower bound of the time, with complete overlap of computation and communication.
        buffers_gb: buffers and results of attention.
        tokens_s: tokens per second in a whole training step.
        mfu: model FLOPs per second of a whole training step, relative to the peak.
        memory_gb: device memory of a whole training step.
        reason: resource that limits the time.
    """

    name: str
    grid: str
    placement: tuple[str, ...]
    ring_variants: tuple[RingVariant, RingVariant]
    keep_gathered_q: bool
    seconds: float | None
    bound_s: float
    buffers_gb: float | None
    tokens_s: float | None
    mfu: float | None
    memory_gb: float | None
    reason: str


def grid_rows(result: SearchResult, configuration: Configuration) -> tuple[list[GridRow], list[GridRow]]:
    """Return rows of the best simulated grids, each in its fastest placement, and rows of the named schemes."""
    best = [_row(configuration, choice) for choice in _in_best_placement(result)[:BEST]]
    return best, [_row(configuration, choice) for choice in named_choices(configuration.choice.job)]


def grid_table(rows: Iterable[GridRow]) -> Table:
    """Return a table with one line per grid. Grids of the search have no scheme name."""
    headings = ("scheme", "grid", ">ms", ">bound", ">MFU %", ">buffers GB", "why", "fastest varying first")
    return Table(
        headings,
        tuple(
            (
                row.name or "-",
                row.grid,
                number(None if row.seconds is None else 1000.0 * row.seconds),
                number(1000.0 * row.bound_s),
                number(None if row.mfu is None else 100 * row.mfu, 1),
                number(row.buffers_gb),
                row.reason,
                ", ".join(row.placement),
            )
            for row in rows
        ),
    )


def _in_best_placement(result: SearchResult) -> list[Choice]:
    first: dict[tuple[int, ...], Choice] = {}
    for choice in result.best:
        first.setdefault(tuple(choice.plan.grid.size_of(axis) for axis in AXES), choice)
    return list(first.values())


def _row(configuration: Configuration, choice: Choice) -> GridRow:
    plan, bound = choice.plan, choice.bound
    common = {
        "name": choice.name or "",
        "grid": str(plan.grid),
        "placement": plan.grid.placement,
        "ring_variants": (plan.forward, plan.backward),
        "keep_gathered_q": choice.keep_gathered_q,
        "bound_s": bound.seconds,
    }
    if not choice.can_be_simulated:
        unknown = dict.fromkeys(("seconds", "buffers_gb", "tokens_s", "mfu", "memory_gb"))
        return GridRow(**common, **unknown, reason=f"not simulated: too many ranks; bound by {bound.resource}")
    step = replace(configuration, choice=choice).step
    return GridRow(
        **common,
        seconds=choice.simulation.seconds,
        buffers_gb=choice.buffer_bytes / 1e9,
        tokens_s=step.tokens_s,
        mfu=step.mfu,
        memory_gb=step.memory_gb,
        reason=_reason(choice),
    )


def _reason(choice: Choice) -> str:
    """Return text: the limiting resource, and the ratios of the time to its lower bound and to the kernel time."""
    seconds, bound = choice.simulation.seconds, choice.bound
    over_kernels = f"{seconds / bound.kernel_s:.2f}x compute"
    if bound.resource == "compute":
        return over_kernels
    return f"{bound.resource}, {seconds / bound.seconds:.2f}x; {over_kernels}"


def grids_summary(result: SearchResult, job: AttentionJob) -> str:
    """Return one line: how many grids were simulated, and how the best grid was chosen."""
    best = result.best[0]
    least = forward_bound(job.cp_size, job.shape.kappa) + backward_bound(job.cp_size, job.shape.kappa)
    ratio = f", {best.volume / least:.2f}x the lower bound for undivided heads" if least else ""
    large = f", {result.too_large} did not fit the memory" if result.too_large else ""
    return (
        f"{len(result.best)} of {result.legal} grids and placements simulated{large}; "
        f"the first has the least traffic of those within {TIE - 1:.0%} of the fastest: "
        f"{best.volume:.2f} query shards received per rank{ratio}"
    )
