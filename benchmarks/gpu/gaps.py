"""A profile of one forward and backward of a rank: a trace, a picture, and the longest time in which no kernel runs.

    python -m benchmarks.gpu.gaps --out runs/gpu            on a GPU: P 64, 1M tokens
    python -m benchmarks.gpu.gaps --smoke --out runs/gpu    anywhere; on a CPU operators stand for kernels

The trace opens in Perfetto and Chrome. Ranges name the steps of the schedule and their tiles.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.one_rank import OneRank
from benchmarks.gpu.report import add_options, device_of, kernel_of, markdown, save
from megatron_wallfacer.engine.ranges import Ranges
from megatron_wallfacer.schedule.schemes import make_plan

ALLOWED_US = 20.0
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Busy:
    """Something that ran; microseconds."""

    name: str
    start: float
    end: float


def busy(trace: Path, *, device: str) -> list[Busy]:
    """What ran on the device, by its start; on a CPU the operators."""
    categories = _ON_DEVICE if device == "cuda" else ("cpu_op",)
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    found = [
        Busy(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in categories and event.get("ph") == "X"
    ]
    return sorted(found, key=lambda one: one.start)


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


def record(options: argparse.Namespace, trace: Path) -> None:
    """Profile one forward and backward, after two that are not."""
    device, dtype = device_of(options), getattr(torch, options.dtype)
    plan = make_plan(options.scheme, options.cp_size, q_heads=options.heads, kv_heads=options.heads)
    heads, kernel = (options.heads, options.heads), kernel_of(options, device, dtype)
    one = OneRank(plan, options.tokens, heads, options.head_dim, kernel, device, dtype, recorder=Ranges())
    q, k, v, dout = one.inputs()
    for _ in range(2):
        one.backward(dout, q, k, v, one.forward(q, k, v))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        one.backward(dout, q, k, v, one.forward(q, k, v))
        if device.type == "cuda":
            torch.cuda.synchronize()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiled.export_chrome_trace(str(trace))


def main(argv: Sequence[str] | None = None) -> int:
    """Profile, draw, print the longest gaps, save; 1 if one on a GPU is too long."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--scheme", default="team-ring")
    parser.add_argument("--cp-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--heads", type=int, default=32)
    options = parser.parse_args(argv)
    if options.smoke:
        options.cp_size, options.tokens, options.head_dim, options.heads = 8, 2048, 32, 4
    folder, device = options.out or Path("runs/gpu"), device_of(options).type
    record(options, folder / "profile.json")
    found = busy(folder / "profile.json", device=device)
    picture(found, folder / "profile.svg")
    longest = gaps(found)[:10]
    rows = [(f"{empty:.1f}", after[:60], before[:60]) for empty, after, before in longest]
    save(options.out, "gaps", markdown(("gap us", "after", "before"), rows))
    return int(device == "cuda" and bool(longest) and longest[0][0] > ALLOWED_US)


if __name__ == "__main__":
    sys.exit(main())
