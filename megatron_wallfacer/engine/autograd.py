"""One autograd function over the two operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine import operators
from megatron_wallfacer.engine.call import Call
from megatron_wallfacer.engine.document_order import chunk_order, document_order


@dataclass(frozen=True)
class Finished:
    """A forward pass that has run: all that backward wants of it, but for the rank's own q, k and v.

    Attributes:
        out: sbhd, in the dtype of q.
        lse: ``[tokens, batch, q_heads]``.
        kept: packets of what the schedule keeps, in its order.
    """

    out: Tensor
    lse: Tensor
    kept: tuple[Tensor, ...]


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
    if call.mask.documents is None:
        return _Attention.apply(q, k, v, sinks, call, finished)
    out = _Attention.apply(*_in_chunk_order(q, k, v, call), sinks, call, finished)
    return document_order(out, call.mask, call.plan.grid.cp_size) if call.mask.reorders else out


def finish(q: Tensor, k: Tensor, v: Tensor, call: Call, sinks: Tensor | None = None) -> Finished:
    """The forward pass alone, for :func:`attend` to take up later. Collective, not differentiable.

    Raises:
        OptionError: as :func:`attend`.
    """
    with torch.no_grad():
        return _finish(*_in_chunk_order(q, k, v, call), call, sinks)


def _in_chunk_order(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, ...]:
    """q, k, v with rows in the order that the schedule numbers them."""
    if not call.mask.reorders:
        return q, k, v
    call.check(q, k)
    return tuple(chunk_order(x, call.mask, call.plan.grid.cp_size) for x in (q, k, v))


def _finish(q: Tensor, k: Tensor, v: Tensor, call: Call, sinks: Tensor | None) -> Finished:
    out, lse, kept = operators.attention(q, k, v, sinks, call.number)
    return Finished(out, lse, tuple(kept))


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
        finished = finished or _finish(q, k, v, call, sinks)
        # Backward holds the call, not only its number: the operators know it for as long as it lives.
        ctx.call, ctx.kv_heads, ctx.head_dim = call, k.shape[2], k.shape[3]
        # Autograd writes into what is returned: the keeper's own tensor stays as it is.
        out = finished.out.detach()
        # Where q, k and v were exchanged along the head axis, backward reads what came, not what was there before.
        inputs = () if call.plan.grid.head > 1 else (q, k, v)
        ctx.kept, ctx.has_sinks = len(finished.kept), sinks is not None
        ctx.save_for_backward(out, finished.lse, *finished.kept, *inputs, *([sinks] if ctx.has_sinks else []))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, *saved = ctx.saved_tensors
        sinks = saved.pop() if ctx.has_sinks else None
        dq, dk, dv, dsinks = operators.attention_backward(
            dout, out, lse, sinks, saved[: ctx.kept], saved[ctx.kept :], ctx.kv_heads, ctx.head_dim, ctx.call.number
        )
        return dq, dk, dv, None if sinks is None else dsinks, None, None
