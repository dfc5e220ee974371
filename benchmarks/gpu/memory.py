"""Peak memory of a rank against the count, and whether allocations grow.

    python -m benchmarks.gpu.memory            on a GPU: P 8, 4, 2 at 8K to 2K tokens per rank, then larger; 200 steps
    python -m benchmarks.gpu.memory --smoke    anywhere; on a CPU nothing is measured, only counted

Measured is what a pass adds to what its caller holds, by the allocator's own count, workspaces of the kernel included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu.efficiency import SCHEMES
from benchmarks.gpu.one_rank import OneRank
from benchmarks.gpu.report import add_options, device_of, head_counts, kernel_of
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.settings import COLUMNS, HEADS, Setting, settings
from megatron_wallfacer.schedule.memory import peak_bytes
from megatron_wallfacer.schedule.schemes import make_plan

ALLOWED = 1.1
_MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One rank of one scheme; bytes, (forward, backward). Nothing is measured where there is no GPU."""

    grid: str
    counted: tuple[float, float]
    measured: tuple[float, float] | None
    growth: int | None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        within = all(got <= ALLOWED * want for got, want in zip(self.measured, self.counted, strict=True))
        return "ok" if within and not self.growth else "over"


def measure(setting: Setting, scheme: str, options: argparse.Namespace) -> Row:
    """Counted and measured bytes of one scheme.

    Raises:
        OptionError: it cannot be had for these heads.
    """
    device, dtype, heads = device_of(options), getattr(torch, options.dtype), setting.heads
    plan = make_plan(
        scheme, setting.cp_size, q_heads=heads[0], kv_heads=heads[1], tokens=setting.tokens // setting.cp_size
    )
    kernel = kernel_of(options, device, dtype)
    one = OneRank(plan, setting.tokens, heads, options.head_dim, kernel, device, dtype)
    q, k, v, dout = one.inputs()
    counted = tuple(peak_bytes(schedule, one.shape) for schedule in one.schedules())
    one.backward(dout, q, k, v, one.forward(q, k, v))
    measured = growth = None
    if device.type == "cuda":
        done: list = []
        measured = (
            added_bytes(lambda: done.append(one.forward(q, k, v))),
            added_bytes(lambda: one.backward(dout, q, k, v, done[0])),
        )
        done.clear()
        growth = _growth(lambda: one.backward(dout, q, k, v, one.forward(q, k, v)), options.steps)
    return Row(str(plan.grid), counted, measured, growth)


def added_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that a call allocates at once, beyond those that were allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _growth(step: Callable[[], object], steps: int) -> int:
    """Bytes reserved after many steps, more than after a few."""
    after = []
    for index in range(steps):
        step()
        if index in (min(10, steps - 1), steps - 1):
            torch.cuda.synchronize()
            after.append(torch.cuda.memory_reserved())
    return after[-1] - after[0]


def cells(row: Row) -> Iterator[tuple[str, ...]]:
    """Rows of the table, one for each pass."""
    for index, name in enumerate(("forward", "backward")):
        measured = ("-", "-", "-")
        if row.measured is not None:
            got = row.measured[index]
            measured = f"{got / _MIB:.1f}", f"{got / row.counted[index]:.3f}", f"{row.growth / _MIB:.1f}"
        yield row.grid, name, f"{row.counted[index] / _MIB:.1f}", *measured, row.verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save; 1 if a rank holds more than is counted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--cp-size", type=int, nargs="+", help="(default: 8, 4, 2, 64, 512)")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of the whole sequence")
    parser.add_argument("--heads", type=head_counts, nargs="+", default=HEADS, metavar="Q,KV")
    parser.add_argument("--steps", type=int, default=200, help="steps in which nothing may grow (default: 200)")
    options = parser.parse_args(argv)
    if options.smoke:
        options.cp_size, options.tokens, options.head_dim, options.steps = (8,), (2048,), 32, 3
        options.heads = ((4, 2),)
    values = "grid", "pass", "counted MiB", "measured MiB", "ratio", "growth MiB"
    rows = Rows("memory", (*COLUMNS, "scheme"), values, options)
    for setting in settings(options.cp_size, options.tokens, options.heads):
        for scheme in SCHEMES:
            work = partial(measure, setting, scheme, options)
            rows.measure((*setting.names, scheme), lambda work=work: cells(work()), setting.cost)
    return rows.close()


if __name__ == "__main__":
    sys.exit(main())
