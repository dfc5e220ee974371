"""Attention of several plans, timed in turns on the job's ranks, with real tensors, kernels and messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_wallfacer.attention import attention
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.volume import Shape


@dataclass(frozen=True)
class Setting:
    """What is computed, the same on every rank.

    Attributes:
        shape: of a rank's shard.
        dtype, device: of the tensors.
        causal: the mask.
        kernel: its name.
        keep_gathered_q: as of :func:`megatron_wallfacer.attention.attention`.
    """

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    causal: bool = True
    kernel: str = "auto"
    keep_gathered_q: bool = False


@dataclass(frozen=True)
class Time:
    """Seconds of one run, of the slowest rank of each pass."""

    forward_s: float
    backward_s: float

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward_s + self.backward_s


def time_plans(
    plans: Sequence[Plan], settings: Setting | Sequence[Setting], *, repeats: int, done: Callable[[], None]
) -> list[list[Time]]:
    """Times of each plan, which take turns: a machine that slows down slows all. Collective.

    Args:
        plans: the same on every rank.
        settings: one for all, or one for each.
        repeats: of each; one more before them is not counted.
        done: called after each run.
    """
    settings = [settings] * len(plans) if isinstance(settings, Setting) else settings
    times: list[list[Time]] = [[] for _ in plans]
    for turn in range(repeats + 1):
        for plan, setting, samples in zip(plans, settings, times, strict=True):
            one = _run(plan, setting)
            if turn:
                samples.append(one)
            done()
    return times


def largest_differences(plans: Sequence[Plan], setting: Setting) -> list[float]:
    """How far each plan's output and gradients are from the first's, over the largest of these; of all ranks.

    The tensors are the same whatever the plan. Collective.
    """
    found, first = [], None
    for plan in plans:
        q, k, v, dout = _tensors(setting, seed=1)
        out = _attend(plan, setting, q, k, v)
        out.backward(dout)
        results = [x.detach().double() for x in (out, q.grad, k.grad, v.grad)]
        first = results if first is None else first
        apart = max(_apart(one, other) for one, other in zip(results, first, strict=True))
        found.append(_largest(apart, setting.device))
    return found


def _apart(one: Tensor, other: Tensor) -> float:
    difference = ((one - other).abs().max() / other.abs().max().clamp_min(1e-30)).item()
    # A NaN would be lost in a maximum.
    return difference if difference == difference else float("inf")


def _run(plan: Plan, setting: Setting) -> Time:
    q, k, v, dout = _tensors(setting)
    begin = _together(setting.device)
    out = _attend(plan, setting, q, k, v)
    forward = _since(begin, setting.device)
    begin = _together(setting.device)
    out.backward(dout)
    return Time(forward, _since(begin, setting.device))


def _attend(plan: Plan, setting: Setting, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    options = {"kernel": setting.kernel, "keep_gathered_q": setting.keep_gathered_q}
    return attention(q, k, v, plan=plan, causal=setting.causal, **options)


def _together(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def _since(begin: float, device: torch.device) -> float:
    """Until the slowest rank is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return _largest(time.perf_counter() - begin, device)


def _largest(value: float, device: torch.device) -> float:
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def _tensors(setting: Setting, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's q, k, v and dout; each chunk has its own seed, so all plans see one sequence."""
    shape, made = setting.shape, []
    generator = torch.Generator(setting.device)
    if seed is not None:
        generator.manual_seed(shard_chunks(dist.get_rank(), dist.get_world_size())[0] + 1000 * seed)
    for heads in (shape.q_heads, shape.kv_heads, shape.kv_heads, shape.q_heads):
        size = (shape.batch, shape.tokens, heads, shape.head_dim)
        made.append(torch.randn(size, dtype=setting.dtype, device=setting.device, generator=generator))
    q, k, v, dout = made
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout
