"""Attention of no tokens: nothing to send and nothing to compute, but gradients all the same."""

from __future__ import annotations

from torch import Tensor


def empty_output(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the output of a batch or a sequence of none, ``[batch, tokens / P, q_heads, v_head_dim]``.

    It depends on its inputs, so that each gets a gradient: empty for q, k and v, zeros for sinks.
    """
    # Sums of nothing are 0. A product would give NaN where a sink is not finite.
    total = q.sum() + k.sum() + v.sum()
    if sinks is not None:
        total = total + sinks[:0].sum().to(q.dtype)
    return q.new_empty((*q.shape[:3], v.shape[3])) + total
