"""PyTorch's profile of a call: its trace, what ran on the device, and how much of the copies ran under kernels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

KERNEL, COPY = "kernel", "gpu_memcpy"
_ON_DEVICE = (KERNEL, COPY, "gpu_memset")


@dataclass(frozen=True)
class Busy:
    """One kernel, copy or operator.

    Attributes:
        name: its name.
        start, end: microseconds.
        category: of the trace, such as :data:`KERNEL`.
    """

    name: str
    start: float
    end: float
    category: str = KERNEL


def save_trace(work: Callable[[], object], device: torch.device, trace: Path) -> None:
    """Profile one call and save its trace, which opens in Perfetto and Chrome."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiled.export_chrome_trace(str(trace))


def busy(trace: Path, *, device: str) -> list[Busy]:
    """Return what ran on the device, by its start; on a CPU the operators."""
    categories = _ON_DEVICE if device == "cuda" else ("cpu_op",)
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    found = [
        Busy(event["name"], event["ts"], event["ts"] + event["dur"], event["cat"])
        for event in events
        if event.get("cat") in categories and event.get("ph") == "X"
    ]
    return sorted(found, key=lambda one: one.start)


def copies_under_kernels(ran: Iterable[Busy]) -> float | None:
    """Return the part of the time of copies in which a kernel ran; None without copies between host and device.

    Args:
        ran: by start.
    """
    kernels = [one for one in ran if one.category == KERNEL]
    copies = [one for one in ran if one.category == COPY and ("DtoH" in one.name or "HtoD" in one.name)]
    total = sum(copy.end - copy.start for copy in copies)
    return sum(_covered(copy, kernels) for copy in copies) / total if total else None


def _covered(copy: Busy, kernels: Iterable[Busy]) -> float:
    """Microseconds of a copy in which some kernel ran; kernels by start, perhaps on several streams."""
    covered, reached = 0.0, copy.start
    for kernel in kernels:
        begin, end = max(kernel.start, reached), min(kernel.end, copy.end)
        if end > begin:
            covered, reached = covered + end - begin, end
    return covered
