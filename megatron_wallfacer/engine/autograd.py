"""The autograd function of attention, which calls the forward and the backward operator."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine import operators
from megatron_wallfacer.engine.call import Call
from megatron_wallfacer.schedule.mask import Mask


@dataclass(frozen=True)
class ForwardResult:
    """The tensors of a forward pass that backward needs, except local q, k and v.

    Attributes:
        out: output, sbhd, in the dtype of q.
        lse: log-sum-exp of the scores, ``[tokens, batch, q_heads]``.
        kept: uint8 tensors with the values that the schedule keeps for backward, in the order of the schedule.
    """

    out: Tensor
    lse: Tensor
    kept: tuple[Tensor, ...]


def attend(
    q: Tensor, k: Tensor, v: Tensor, call: Call, result: ForwardResult | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Return differentiable attention on local shards, sbhd. The call is collective over the context-parallel group.

    Args:
        q: local queries, sbhd.
        k: local keys, sbhd.
        v: local values, sbhd.
        call: arguments of attention that are not tensors.
        result: result of an earlier forward pass on the same q, k and v, which then replaces the forward pass.
        sinks: one additional logit per head, ``[q_heads]``, whose value vector is zero. The gradient of the sinks
            covers only the rows of this rank.

    Raises:
        OptionError: The size of the head axis does not divide the heads, or :meth:`Mask.check` rejects the mask.
    """
    if call.mask.documents is None:
        return _Attention.apply(q, k, v, sinks, call, result)
    out = _Attention.apply(*_in_chunk_order(q, k, v, call), sinks, call, result)
    return _document_order(out, call.mask, call.plan.grid.cp_size) if call.mask.reorders else out


def run_forward(q: Tensor, k: Tensor, v: Tensor, call: Call, sinks: Tensor | None = None) -> ForwardResult:
    """Run the forward pass, and return its result for :func:`attend`. The pass is collective and not differentiable.

    Raises:
        OptionError: The size of the head axis does not divide the heads, or :meth:`Mask.check` rejects the mask.
    """
    with torch.no_grad():
        return _run_forward(*_in_chunk_order(q, k, v, call), call, sinks)


def _in_chunk_order(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, ...]:
    if not call.mask.reorders:
        return q, k, v
    call.check(q, k)
    return tuple(_chunk_order(x, call.mask, call.plan.grid.cp_size) for x in (q, k, v))


def _run_forward(q: Tensor, k: Tensor, v: Tensor, call: Call, sinks: Tensor | None) -> ForwardResult:
    out, lse, kept = operators.attention(q, k, v, sinks, call.number)
    return ForwardResult(out, lse, tuple(kept))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call, result: ForwardResult | None
    ) -> Tensor:
        result = result or _run_forward(q, k, v, call, sinks)
        # Operators find the call by its number only while the call exists, so backward keeps the call itself.
        ctx.call, ctx.kv_heads, ctx.head_dim = call, k.shape[2], k.shape[3]
        # Autograd writes into the returned tensor, so the tensor of a cached result must not be returned itself.
        out = result.out.detach()
        # If q, k and v were exchanged along the head axis, backward reads the exchanged tensors, which are in `kept`.
        inputs = () if call.plan.grid.head > 1 else (q, k, v)
        ctx.kept, ctx.has_sinks = len(result.kept), sinks is not None
        ctx.save_for_backward(out, result.lse, *result.kept, *inputs, *([sinks] if ctx.has_sinks else []))
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


def _chunk_order(x: Tensor, mask: Mask, cp_size: int) -> Tensor:
    """Reorder the rows of a shard from document order to the chunk order of a schedule.

    A ``per_document`` shard has one document after another, each with its low chunk before its high chunk, as in
    Megatron and TransformerEngine. A schedule needs the low chunks of all documents first, then the high chunks of all
    documents.
    """
    halves = _halves(mask, cp_size)
    return torch.cat([piece for half in (0, 1) for piece in x.split(halves)[half::2]])


def _document_order(x: Tensor, mask: Mask, cp_size: int) -> Tensor:
    """Reorder the rows of a shard from chunk order to document order: the inverse of :func:`_chunk_order`."""
    halves = _halves(mask, cp_size)
    ends = list(accumulate(halves[::2], initial=0))
    low, high = x.split([ends[-1], ends[-1]])
    return torch.cat([half[start:end] for start, end in pairwise(ends) for half in (low, high)])


def _halves(mask: Mask, cp_size: int) -> list[int]:
    """Return the row counts of the low and of the high chunk of each document, one document after another."""
    return [(end - start) // (2 * cp_size) for start, end in pairwise(mask.documents or ()) for _ in range(2)]
