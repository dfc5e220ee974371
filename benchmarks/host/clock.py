"""Processor time of one thread, in slices: what ``x[a:b]`` of a tensor takes between the passes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

#: Slices that are timed together. So few because a pass runs no code twice in a row: in a loop of thousands a slice
#: takes half as long.
_SLICES = 5


def in_slices(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Host time of functions that run in turns, with a few slices after each: medians over the rounds, in slices.

    The garbage collector is off: when it runs is chance.

    Args:
        functions: in the order of a round.
        rounds: number of times that each runs.
    """
    x = torch.zeros(64, 1, 4, 8)
    times: list[list[float]] = [[] for _ in functions]
    slices: list[float] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for function, found in zip(functions, times, strict=True):
                begin = time.thread_time()
                function()
                end = time.thread_time()
                for _ in range(_SLICES):
                    x[2:4]
                slices.append((time.thread_time() - end) / _SLICES)
                found.append(end - begin)
    finally:
        gc.enable()
    unit = median(slices)
    return [median(found) / unit for found in times]
