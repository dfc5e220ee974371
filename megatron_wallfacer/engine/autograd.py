"""One autograd function over the schedules of one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine.backward import run_backward
from megatron_wallfacer.engine.forward import run_forward
from megatron_wallfacer.engine.runtime import Runtime
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule


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


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Differentiable attention on local shards, sbhd; collective over the context-parallel group."""
    return _Attention.apply(q, k, v, call)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        schedule = forward_schedule(call.plan, call.runtime.transfers.groups.rank, causal=call.causal)
        # The dtypes are the caller's choice: autocast must not make the reference kernel's products bf16.
        with torch.autocast(q.device.type, enabled=False):
            out, lse, q_block = run_forward(schedule, call.runtime, q, k, v)
        ctx.save_for_backward(q_block if call.keep_gathered_q else q, k, v, out, lse)
        ctx.call = call
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        call: Call = ctx.call
        rank = call.runtime.transfers.groups.rank
        schedule = backward_schedule(call.plan, rank, causal=call.causal, q_kept=call.keep_gathered_q)
        local = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout}
        with torch.autocast(q.device.type, enabled=False):
            dq, dk, dv = run_backward(schedule, call.runtime, local)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None
