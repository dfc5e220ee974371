"""Choices of the planner, timed in turns on the job's ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

from megatron_wallfacer.planning.choice import Choice
from megatron_wallfacer.tuning.attention_times import Setting, time_plans


def time_choices(
    choices: Sequence[Choice],
    dtype: torch.dtype,
    device: torch.device,
    *,
    kernel: str,
    repeats: int,
    done: Callable[[], None],
) -> list[float]:
    """Median seconds of forward + backward of each choice, until the slowest rank is done. Collective.

    Args:
        choices: of one job; the same on every rank.
        dtype, device: of the tensors.
        kernel: its name.
        repeats: of each, in turns; one more before them is not counted.
        done: called after each run.
    """
    settings = [
        Setting(one.job.shape, dtype, device, causal=one.job.causal, kernel=kernel, keep_gathered_q=one.q_kept)
        for one in choices
    ]
    times = time_plans([one.plan for one in choices], settings, repeats=repeats, done=done)
    return [median(one.seconds for one in samples) for samples in times]
