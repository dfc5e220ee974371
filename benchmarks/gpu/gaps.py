"""A profile of one forward and backward of a rank: a trace, a picture, and the longest time in which no kernel runs.

    python -m benchmarks.gpu.gaps --out runs/gpu            on a GPU: P 8 with 8K tokens per rank, then P 64 with 16K
    python -m benchmarks.gpu.gaps --smoke --out runs/gpu    anywhere; on a CPU operators stand for kernels

The trace opens in Perfetto and Chrome. Ranges name the steps of the schedule and their tiles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.one_rank import OneRank
from benchmarks.gpu.profiled import Busy, busy, save_trace
from benchmarks.gpu.report import add_options, device_of, head_counts, kernel_of
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.settings import COLUMNS, Setting
from megatron_wallfacer.engine.ranges import Ranges
from megatron_wallfacer.schedule.schemes import make_plan

ALLOWED_US = 20.0


def gaps(found: Iterable[Busy]) -> list[tuple[float, str, str]]:
    """(microseconds, after what, before what) where nothing runs, longest first."""
    empty, last = [], None
    for one in found:
        if last is not None and one.start > last.end:
            empty.append((one.start - last.end, last.name, one.name))
        if last is None or one.end > last.end:
            last = one
    return sorted(empty, reverse=True)


def picture(found: Sequence[Busy], path: Path) -> None:
    """A line of what ran, over milliseconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    begin = found[0].start
    figure, axes = pyplot.subplots(figsize=(12, 2), layout="constrained")
    axes.broken_barh([((one.start - begin) / 1e3, (one.end - one.start) / 1e3) for one in found], (0, 1))
    axes.set_yticks([])
    axes.set_xlabel("milliseconds")
    axes.set_title("kernels of one rank: forward, then backward")
    figure.savefig(path)
    pyplot.close(figure)


def record(setting: Setting, options: argparse.Namespace, trace: Path) -> None:
    """Profile one forward and backward, after two that are not."""
    device, dtype, heads = device_of(options), getattr(torch, options.dtype), setting.heads
    plan = make_plan(
        options.scheme, setting.cp_size, q_heads=heads[0], kv_heads=heads[1], tokens=setting.tokens // setting.cp_size
    )
    kernel = kernel_of(options, device, dtype)
    one = OneRank(plan, setting.tokens, heads, options.head_dim, kernel, device, dtype, observer=Ranges())
    q, k, v, dout = one.inputs()
    for _ in range(2):
        one.backward(dout, q, k, v, one.forward(q, k, v))
    save_trace(lambda: one.backward(dout, q, k, v, one.forward(q, k, v)), device, trace)


def measure(setting: Setting, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """The longest gaps of one rank; its trace and its picture are saved."""
    folder, device = options.out or Path("runs/gpu"), device_of(options).type
    name = f"profile-p{setting.cp_size}-{setting.tokens // 1024}k"
    record(setting, options, folder / f"{name}.json")
    ran = busy(folder / f"{name}.json", device=device)
    picture(ran, folder / f"{name}.svg")
    for empty, after, before in gaps(ran)[:10]:
        yield f"{empty:.1f}", after[:60], before[:60], "over" if device == "cuda" and empty > ALLOWED_US else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Profile, draw, print the longest gaps, save; 1 if one on a GPU is too long."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--scheme", default="team-ring")
    parser.add_argument("--cp-size", type=int, nargs="+", default=(8, 64))
    parser.add_argument("--tokens", type=int, nargs="+", default=(1 << 16, 1 << 20), help="one for each --cp-size")
    parser.add_argument("--heads", type=head_counts, default=(32, 8), metavar="Q,KV")
    options = parser.parse_args(argv)
    if options.smoke:
        options.cp_size, options.tokens, options.head_dim, options.heads = (8,), (2048,), 32, (4, 4)
    if len(options.cp_size) != len(options.tokens):
        parser.error(f"--tokens: {len(options.tokens)} values for {len(options.cp_size)} of --cp-size")
    rows = Rows("gaps", (*COLUMNS, "scheme"), ("gap us", "after", "before"), options)
    for cp_size, tokens in zip(options.cp_size, options.tokens, strict=True):
        setting = Setting(cp_size, tokens, options.heads)
        rows.measure((*setting.names, options.scheme), partial(measure, setting, options), setting.cost)
    return rows.close()


if __name__ == "__main__":
    sys.exit(main())
