"""Call a function on all ranks at the same time, and return the time of the slowest rank."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist


def time_call[Result](work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Call a function on all ranks at the same time. All ranks must call this function, but ``work`` may differ.

    A CUDA device is synchronized before and after the call.

    Returns:
        The result of this rank, and the seconds of the slowest rank.
    """
    _synchronize(device)
    dist.barrier()
    begin = time.perf_counter()
    result = work()
    _synchronize(device)
    return result, largest(time.perf_counter() - begin, device)


def time_calls(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Time ``repeats`` calls of a function, after one call that is not timed. All ranks must call this function.

    Returns:
        The seconds of the slowest rank for each call.
    """
    return [time_call(work, device)[1] for _ in range(1 + repeats)][1:]


def largest(value: float, device: torch.device) -> float:
    """Return the largest value of all ranks. All ranks must call this function."""
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
