"""Time attention of several plans with real tensors, kernels and messages, and compare the results of the plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_wallfacer.attention import attention
from megatron_wallfacer.planning.choice import Choice
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.volume import Shape
from megatron_wallfacer.tuning.timing import largest, time_call


@dataclass(frozen=True)
class AttentionWorkload:
    """The attention call whose time one rank measures. ``shape`` is the shape of the rank's shard.

    Only ``device`` may differ between ranks. If ``causal`` is False, each query attends to all keys.
    """

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    causal: bool = True
    kernel: str = "auto"
    keep_gathered_q: bool = False


@dataclass(frozen=True)
class PassTimes:
    """Seconds of the slowest rank for one run of forward and backward."""

    forward_s: float
    backward_s: float

    @property
    def seconds(self) -> float:
        """Time of forward plus backward, in seconds."""
        return self.forward_s + self.backward_s


def time_plans(
    plans: Sequence[Plan],
    workloads: Sequence[AttentionWorkload],
    *,
    repeats: int,
    done: Callable[[], None],
) -> list[list[PassTimes]]:
    """Measure the time of several plans in turn. All ranks must call this function.

    Each plan runs once without timing and ``repeats`` times with timing. In each round all plans run once, so that a
    slow phase of a node affects all plans. ``done`` is called after each run.

    Returns:
        For each plan, the times of its ``repeats`` runs.
    """
    times: list[list[PassTimes]] = [[] for _ in plans]
    for repeat in range(repeats + 1):
        for plan, workload, samples in zip(plans, workloads, times, strict=True):
            sample = _time_passes(plan, workload)
            if repeat:
                samples.append(sample)
            done()
    return times


def time_choices(
    choices: Sequence[Choice],
    dtype: torch.dtype,
    device: torch.device,
    *,
    kernel: str,
    repeats: int,
    done: Callable[[], None],
) -> list[float]:
    """Time the planner's candidates, and return the median seconds of forward plus backward of each candidate.

    All ranks must call this function with the same candidates. See :func:`time_plans` for ``repeats`` and ``done``.
    """
    workloads = [
        AttentionWorkload(choice.job.shape, dtype, device, choice.job.causal, kernel, choice.keep_gathered_q)
        for choice in choices
    ]
    times = time_plans([choice.plan for choice in choices], workloads, repeats=repeats, done=done)
    return [median(sample.seconds for sample in samples) for samples in times]


def largest_differences(plans: Sequence[Plan], workload: AttentionWorkload) -> list[float]:
    """Compare output and gradients of each plan with the first plan. All ranks must call this function.

    All plans compute attention of the same sequence.

    Returns:
        For each plan, the largest |x - y| / max(|y|) of out, dq, dk and dv on any rank. x is the plan's tensor, and y
        is the first plan's tensor.
    """
    differences, first = [], None
    for plan in plans:
        q, k, v, dout = _tensors(workload, seed=1)
        out = _attend(plan, workload, q, k, v)
        out.backward(dout)
        results = [tensor.detach().double() for tensor in (out, q.grad, k.grad, v.grad)]
        first = results if first is None else first
        difference = max(_difference(result, wanted) for result, wanted in zip(results, first, strict=True))
        differences.append(largest(difference, workload.device))
    return differences


def _difference(result: Tensor, wanted: Tensor) -> float:
    difference = ((result - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()
    # A NaN differs from itself. Python's max() may ignore a NaN, so return infinity instead.
    return difference if difference == difference else float("inf")


def _time_passes(plan: Plan, workload: AttentionWorkload) -> PassTimes:
    q, k, v, dout = _tensors(workload)
    out, forward_s = time_call(lambda: _attend(plan, workload, q, k, v), workload.device)
    _, backward_s = time_call(lambda: out.backward(dout), workload.device)
    return PassTimes(forward_s, backward_s)


def _attend(plan: Plan, workload: AttentionWorkload, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    options = {"kernel": workload.kernel, "keep_gathered_q": workload.keep_gathered_q}
    return attention(q, k, v, plan=plan, causal=workload.causal, **options)


def _tensors(workload: AttentionWorkload, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and dO of this rank, ``[b, s/P, h, d]``. The seed depends only on the shard, not on the plan."""
    shape, tensors = workload.shape, []
    generator = torch.Generator(workload.device)
    if seed is not None:
        generator.manual_seed(shard_chunks(dist.get_rank(), dist.get_world_size())[0] + 1000 * seed)
    for heads in (shape.q_heads, shape.kv_heads, shape.kv_heads, shape.q_heads):
        size = (shape.batch, shape.tokens, heads, shape.head_dim)
        tensors.append(torch.randn(size, dtype=workload.dtype, device=workload.device, generator=generator))
    q, k, v, dout = tensors
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout
