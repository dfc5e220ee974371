"""Times of work on a device, in turns: machines and clocks drift, so what is compared runs side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, by the device's own clock where it has one."""
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def host_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median seconds of the host for one call: its launches, without the work on the device.

    On a CPU the host does the work itself, so it is the time of the call.
    """
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return median(times)


def medians(works: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each, in rounds in which each runs once; one more round before them is not counted."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            found[name].append(seconds(work, device))
    return {name: median(times[1:]) for name, times in found.items()}
