"""One autograd function over the schedules of one rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine.blocks import Sizes
from megatron_wallfacer.engine.run import Runtime, run
from megatron_wallfacer.schedule.heads import check_heads, head_groups
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule

# A training run asks for the same few schedules at every layer and step.
_forward_schedule = lru_cache(maxsize=64)(forward_schedule)
_backward_schedule = lru_cache(maxsize=64)(backward_schedule)


@dataclass(frozen=True)
class Call:
    """Everything about one call of attention but its tensors.

    Attributes:
        plan: grid and choices.
        runtime: transfers, kernel, scale.
        causal: mask keys after the query's position in the whole sequence.
        keep_gathered_q: save the team's queries for backward instead of gathering them again.
    """

    plan: Plan
    runtime: Runtime
    causal: bool = True
    keep_gathered_q: bool = False

    def schedules(self, groups: int) -> tuple[Schedule, Schedule]:
        """Forward and backward schedule of this rank."""
        rank = self.runtime.transfers.groups.rank
        options = {"causal": self.causal, "groups": groups, "q_kept": self.keep_gathered_q}
        return _forward_schedule(self.plan, rank, **options), _backward_schedule(self.plan, rank, **options)


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Differentiable attention on local shards, sbhd; collective over the context-parallel group.

    Raises:
        OptionError: the heads do not divide along the head axis.
    """
    check_heads(call.plan, q.shape[2], k.shape[2])
    return _Attention.apply(q, k, v, call)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        groups = head_groups(call.plan, q.shape[2], k.shape[2])
        sizes = Sizes.of(q, k, v, call.plan.grid.head * groups)
        schedule, ctx.schedule = call.schedules(groups)
        # The dtypes are the caller's choice: autocast must not make the reference kernel's products bf16.
        with torch.autocast(q.device.type, enabled=False):
            results, kept = run(schedule, call.runtime, sizes, {"q": q, "k": k, "v": v}, {})
        out = results["out"].to(q.dtype)
        ctx.kept, ctx.sizes, ctx.runtime = list(kept), sizes, call.runtime
        # Where q, k and v were exchanged along the head axis, backward reads what came, not what was there before.
        local = () if call.plan.grid.head > 1 else (q, k, v)
        ctx.save_for_backward(out, results["lse"], *(block.packet for block in kept.values()), *local)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, *saved = ctx.saved_tensors
        packets, inputs = saved[: len(ctx.kept)], saved[len(ctx.kept) :]
        schedule: Schedule = ctx.schedule
        given = {
            name: ctx.sizes.unpack(schedule.values[name], packet)
            for name, packet in zip(ctx.kept, packets, strict=True)
            if name in schedule.given
        }
        local = dict(zip("qkv", inputs, strict=False)) | {"dout": dout, "lse": lse}
        local["delta"] = (dout.to(lse.dtype) * out).sum(-1)
        with torch.autocast(dout.device.type, enabled=False):
            results, _ = run(schedule, ctx.runtime, ctx.sizes, local, given)
        return *(results[name].to(out.dtype) for name in ("dq", "dk", "dv")), None
