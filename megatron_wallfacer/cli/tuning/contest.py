"""Plans run in turns on the job's ranks, with real tensors, kernels and messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.distributed as dist

from megatron_wallfacer.attention import attention
from megatron_wallfacer.planning.search import Choice


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
    times: list[list[float]] = [[] for _ in choices]
    for turn in range(repeats + 1):
        for choice, samples in zip(choices, times, strict=True):
            seconds = _run(choice, dtype, device, kernel)
            if turn:
                samples.append(seconds)
            done()
    return [median(samples) for samples in times]


def _run(choice: Choice, dtype: torch.dtype, device: torch.device, kernel: str) -> float:
    shape = choice.job.shape
    heads = (shape.q_heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (
        torch.randn(1, shape.tokens, count, shape.head_dim, dtype=dtype, device=device, requires_grad=True)
        for count in heads
    )
    dout = torch.randn_like(q)
    options = {"causal": choice.job.causal, "kernel": kernel, "keep_gathered_q": choice.q_kept}
    dist.barrier()
    begin = time.perf_counter()
    attention(q, k, v, plan=choice.plan, **options).backward(dout)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - begin, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()
