"""One autograd function over the schedules of one rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine.blocks import Sizes
from megatron_wallfacer.engine.merge import add_sinks, sinks_gradient
from megatron_wallfacer.engine.packed import chunk_order, document_order
from megatron_wallfacer.engine.run import Runtime, run
from megatron_wallfacer.schedule.heads import check_heads, head_groups
from megatron_wallfacer.schedule.mask import CAUSAL, Mask, pattern_of
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule

# A training run asks for the same few schedules at every layer and step.
_forward_schedule = lru_cache(maxsize=64)(forward_schedule)
_backward_schedule = lru_cache(maxsize=64)(backward_schedule)
_pattern = lru_cache(maxsize=64)(pattern_of)


@dataclass(frozen=True)
class Call:
    """Everything about one call of attention but its tensors.

    Attributes:
        plan: grid and choices.
        runtime: transfers, kernel, scale.
        mask: which pairs are live.
        keep_gathered_q: save the team's queries for backward instead of gathering them again.
    """

    plan: Plan
    runtime: Runtime
    mask: Mask = CAUSAL
    keep_gathered_q: bool = False

    def schedules(self, groups: int, chunk: int) -> tuple[Schedule, Schedule]:
        """Forward and backward schedule of this rank, for so many head groups and tokens of a chunk."""
        rank, cp_size = self.runtime.transfers.groups.rank, self.plan.grid.cp_size
        options = {"groups": groups, "q_kept": self.keep_gathered_q, "causal": self.mask.right == 0}
        options["pattern"] = _pattern(self.mask, cp_size, chunk)
        return _forward_schedule(self.plan, rank, **options), _backward_schedule(self.plan, rank, **options)


@dataclass(frozen=True)
class Finished:
    """A forward pass that has run: all that backward wants of it, but for the rank's own q, k and v.

    Attributes:
        out: sbhd, in the dtype of q.
        lse: ``[tokens, batch, q_heads]``.
        kept: packets of what the schedule keeps, by name.
    """

    out: Tensor
    lse: Tensor
    kept: dict[str, Tensor]


def attend(
    q: Tensor, k: Tensor, v: Tensor, call: Call, finished: Finished | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Differentiable attention on local shards, sbhd; collective over the context-parallel group.

    Args:
        q, k, v: sbhd.
        call: the rest.
        finished: the forward pass of these q, k and v, where it has run before; it is then not run again.
        sinks: ``[q_heads]``, a logit that every query of a head sees beside its keys, with a value of zero; its
            gradient is that of this rank's rows.

    Raises:
        OptionError: the heads do not divide along the head axis, or the mask does not fit the sequence.
    """
    cp_size = call.plan.grid.cp_size
    q, k, v = _checked(q, k, v, call)
    return document_order(_Attention.apply(q, k, v, sinks, call, finished), call.mask, cp_size)


def finish(q: Tensor, k: Tensor, v: Tensor, call: Call, sinks: Tensor | None = None) -> Finished:
    """The forward pass alone, for :func:`attend` to take up later. Collective, not differentiable.

    Raises:
        OptionError: as :func:`attend`.
    """
    q, k, v = _checked(q, k, v, call)
    sizes, schedule, _ = _prepare(q, k, v, call)
    return _finish(q, k, v, call, sinks, sizes, schedule)


def _checked(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, ...]:
    """q, k, v in the order of chunks, if heads and mask fit them."""
    cp_size = call.plan.grid.cp_size
    check_heads(call.plan, q.shape[2], k.shape[2])
    call.mask.check(cp_size, cp_size * q.shape[0])
    return tuple(chunk_order(x, call.mask, cp_size) for x in (q, k, v))


def _finish(
    q: Tensor, k: Tensor, v: Tensor, call: Call, sinks: Tensor | None, sizes: Sizes, schedule: Schedule
) -> Finished:
    # The dtypes are the caller's choice: autocast must not make the reference kernel's products bf16.
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        results, kept = run(schedule, call.runtime, sizes, {"q": q, "k": k, "v": v}, {}, call.mask)
        if sinks is not None:
            add_sinks(results["out"], results["lse"], sinks)
    packets = {name: block.packet for name, block in kept.items()}
    return Finished(results["out"].to(q.dtype), results["lse"], packets)


def _prepare(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Sizes, Schedule, Schedule]:
    """Sizes of a call, and its schedules forward and backward."""
    groups = head_groups(call.plan, q.shape[2], k.shape[2])
    sizes = Sizes.of(q, k, v, call.plan.grid.head * groups)
    return sizes, *call.schedules(groups, sizes.chunk)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        call: Call,
        finished: Finished | None,
    ) -> Tensor:
        ctx.sizes, schedule, ctx.schedule = _prepare(q, k, v, call)
        finished = finished or _finish(q, k, v, call, sinks, ctx.sizes, schedule)
        ctx.kept, ctx.runtime, ctx.mask = list(finished.kept), call.runtime, call.mask
        # Autograd writes into what is returned: the keeper's own tensor stays as it is.
        out = finished.out.detach()
        # Where q, k and v were exchanged along the head axis, backward reads what came, not what was there before.
        local = () if call.plan.grid.head > 1 else (q, k, v)
        ctx.sinks = 0 if sinks is None else 1
        ctx.save_for_backward(out, finished.lse, *(sinks,)[: ctx.sinks], *finished.kept.values(), *local)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, *saved = ctx.saved_tensors
        sinks, saved = saved[: ctx.sinks], saved[ctx.sinks :]
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
            results, _ = run(schedule, ctx.runtime, ctx.sizes, local, given, ctx.mask)
        dsinks = sinks_gradient(local["lse"], local["delta"], *sinks) if sinks else None
        return *(results[name].to(out.dtype) for name in ("dq", "dk", "dv")), dsinks, None, None
