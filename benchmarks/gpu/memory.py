"""Peak memory of a rank against the count, and whether allocations grow.

    python -m benchmarks.gpu.memory            on a GPU: P 64, 1M tokens, and 200 steps
    python -m benchmarks.gpu.memory --smoke    anywhere; on a CPU nothing is measured, only counted

Measured is what a pass adds to what its caller holds, by the allocator's own count, workspaces of the kernel included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.efficiency import HEADS, SCHEMES
from benchmarks.gpu.one_rank import OneRank
from benchmarks.gpu.report import add_options, device_of, kernel_of, markdown, save
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.memory import peak_bytes
from megatron_wallfacer.schedule.schemes import make_plan

ALLOWED = 1.1
_MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One rank of one scheme; bytes, (forward, backward). Nothing is measured where there is no GPU."""

    heads: str
    scheme: str
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


def measure(heads: tuple[int, int], scheme: str, options: argparse.Namespace) -> Row:
    """One scheme.

    Raises:
        OptionError: it cannot be had for these heads.
    """
    device, dtype = device_of(options), getattr(torch, options.dtype)
    plan = make_plan(scheme, options.cp_size, q_heads=heads[0], kv_heads=heads[1])
    one = OneRank(
        plan, options.tokens, heads, options.head_dim, kernel_of(options, device, dtype), device, dtype, reuse=False
    )
    q, k, v, dout = one.inputs()
    sizes = one.call.sizes(q, heads[1], options.head_dim, options.head_dim)
    schedules = one.call.forward_schedule(sizes), one.call.backward_schedule(sizes)
    counted = tuple(peak_bytes(schedule, sizes.shard) for schedule in schedules)
    one.backward(dout, q, k, v, one.forward(q, k, v))
    measured = growth = None
    if device.type == "cuda":
        done: list = []
        measured = (
            _added(lambda: done.append(one.forward(q, k, v))),
            _added(lambda: one.backward(dout, q, k, v, done[0])),
        )
        done.clear()
        growth = _growth(lambda: one.backward(dout, q, k, v, one.forward(q, k, v)), options.steps)
    return Row(f"{heads[0]},{heads[1]}", scheme, str(plan.grid), counted, measured, growth)


def _added(work: Callable[[], object]) -> int:
    """Bytes that a call has at once, more than there were before it."""
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


def table(found: Sequence[Row]) -> str:
    """Markdown."""
    heading = "heads", "scheme", "grid", "pass", "counted MiB", "measured MiB", "ratio", "growth MiB", "verdict"
    lines = []
    for row in found:
        for index, name in enumerate(("forward", "backward")):
            measured = ("-", "-", "-")
            if row.measured is not None:
                got = row.measured[index]
                measured = f"{got / _MIB:.1f}", f"{got / row.counted[index]:.3f}", f"{row.growth / _MIB:.1f}"
            counted = f"{row.counted[index] / _MIB:.1f}"
            lines.append((row.heads, row.scheme, row.grid, name, counted, *measured, row.verdict))
    return markdown(heading, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; 1 if a rank holds more than is counted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--cp-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(argv)
    heads = HEADS
    if options.smoke:
        options.cp_size, options.tokens, options.head_dim, options.steps, heads = 8, 2048, 32, 3, ((4, 2),)
    found = []
    for pair in heads:
        for scheme in SCHEMES:
            try:
                found.append(measure(pair, scheme, options))
            except (OptionError, torch.OutOfMemoryError) as error:
                print(f"heads {pair}, {scheme}: left out: {error}", file=sys.stderr)
    save(options.out, "memory", table(found))
    return int(any(row.verdict == "over" for row in found))


if __name__ == "__main__":
    sys.exit(main())
