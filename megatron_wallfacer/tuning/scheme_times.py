"""What comes of timed schemes: medians, spread, rates, and whether they agree."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median

import torch

from megatron_wallfacer.planning.costs import BACKWARD_FLOPS, FORWARD_FLOPS
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.tuning.attention_times import Setting, Time

#: Outputs and gradients of two schemes may differ by so much of the largest entry: sums in another order.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Row:
    """One scheme.

    Attributes:
        scheme, grid: its name and axes.
        median_ms, forward_ms, backward_ms: of both passes, of each; medians of the slowest rank.
        fastest_ms, slowest_ms: of both passes.
        ratio: its median over that of the first scheme.
        tokens_s: of the whole job, a layer forward and backward.
        tflops: of a rank.
        difference, tolerance: from the first scheme, over the largest entry; what is allowed.
    """

    scheme: str
    grid: str
    median_ms: float
    forward_ms: float
    backward_ms: float
    fastest_ms: float
    slowest_ms: float
    ratio: float
    tokens_s: float
    tflops: float
    difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """The difference is allowed."""
        return self.difference <= self.tolerance


def rows(
    schemes: Sequence[str],
    plans: Sequence[Plan],
    times: Sequence[Sequence[Time]],
    differences: Sequence[float],
    setting: Setting,
) -> list[Row]:
    """One for each scheme, in their order."""
    shape, first = setting.shape, median(one.seconds for one in times[0])
    found = []
    for scheme, plan, samples, difference in zip(schemes, plans, times, differences, strict=True):
        seconds, tokens = [one.seconds for one in samples], shape.tokens * plan.grid.cp_size
        middle = median(seconds)
        # A rank's share of all pairs of the sequence.
        pairs = tokens * shape.tokens * (0.5 if setting.causal else 1.0)
        flops = (FORWARD_FLOPS + BACKWARD_FLOPS) * shape.batch * pairs * shape.q_heads * shape.head_dim
        found.append(
            Row(
                scheme,
                str(plan.grid),
                median_ms=1e3 * middle,
                forward_ms=1e3 * median(one.forward_s for one in samples),
                backward_ms=1e3 * median(one.backward_s for one in samples),
                fastest_ms=1e3 * min(seconds),
                slowest_ms=1e3 * max(seconds),
                ratio=middle / first,
                tokens_s=shape.batch * tokens / middle,
                tflops=flops / middle / 1e12,
                difference=difference,
                tolerance=TOLERANCES[setting.dtype],
            )
        )
    return found


def as_csv(found: Iterable[Row]) -> str:
    """A heading and a line each."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [one.name for one in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in found)
    return text.getvalue()


def print_rows(found: Sequence[Row], title: str) -> None:
    """Print it."""
    from rich.console import Console

    from megatron_wallfacer.cli.table import new_table, print_table

    console = Console()
    headings = (
        "scheme",
        "grid",
        "ms",
        "forward",
        "backward",
        "from",
        "to",
        "ratio",
        "tokens/s",
        "TFLOP/s a rank",
        "apart",
    )
    table = new_table(console, *headings, title=title, justify="right")
    for row in found:
        milliseconds = (row.median_ms, row.forward_ms, row.backward_ms, row.fastest_ms, row.slowest_ms)
        apart = f"{row.difference:.1e}" + ("" if row.agrees else " TOO FAR")
        rates = (f"{row.ratio:.2f}", f"{row.tokens_s:.0f}", f"{row.tflops:.3g}")
        table.add_row(row.scheme, row.grid, *(f"{one:.2f}" for one in milliseconds), *rates, apart)
    print_table(console, table)
    verdict = "agree" if all(row.agrees for row in found) else "DO NOT AGREE"
    print(f"Outputs and gradients {verdict} with the first scheme's to {found[0].tolerance:.0e} of the largest entry.")
