"""Timing on all ranks: they start together, and the time of the slowest rank is taken."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist


def time_call[Result](work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Call a function on all ranks at once and time it. Collective.

    Args:
        work: function to time; other ranks may pass another function.
        device: device of the rank. On CUDA its work has finished when the clock starts and stops.

    Returns:
        Result of this rank, and seconds of the slowest rank.
    """
    _synchronize(device)
    dist.barrier()
    begin = time.perf_counter()
    result = work()
    _synchronize(device)
    return result, largest(time.perf_counter() - begin, device)


def time_calls(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Time several calls of a function, after one call that is not counted. Collective.

    Args:
        work: function to time.
        device: device of the rank.
        repeats: number of timed calls.

    Returns:
        Seconds of the slowest rank, for each call.
    """
    return [time_call(work, device)[1] for _ in range(1 + repeats)][1:]


def largest(value: float, device: torch.device) -> float:
    """Return the largest value of all ranks. Collective."""
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
