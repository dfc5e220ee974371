"""Measure copies between GPUs and host memory, and the size of host memory."""

from __future__ import annotations

import os

import torch

from megatron_wallfacer.tuning.timing import time_calls

#: Bytes of one copy, and number of timed copies per direction.
SIZE, REPEATS = 256 << 20, 5


def measure_host_memory(device: torch.device) -> tuple[float | None, float | None]:
    """Measure the link between a GPU and host memory while all ranks copy. All ranks must call this function.

    Returns:
        Rate of the slower direction in 1e9 bytes per second, and host memory per node in 1e9 bytes, or (None, None) on
        CPUs.
    """
    if device.type != "cuda":
        return None, None
    on_gpu, on_host = (
        torch.empty(SIZE, dtype=torch.uint8, **place) for place in ({"device": device}, {"pin_memory": True})
    )
    slower_s = max(_copy_s(on_host, on_gpu, device), _copy_s(on_gpu, on_host, device))
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return SIZE / slower_s / 1e9, size / 1e9


def _copy_s(target: torch.Tensor, source: torch.Tensor, device: torch.device) -> float:
    return min(time_calls(lambda: target.copy_(source, non_blocking=True), device, REPEATS))
