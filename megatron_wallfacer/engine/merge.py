"""Merging partial attention results by their log-sum-exp, safe where a row has seen no key yet (lse = -inf)."""

from __future__ import annotations

import torch
from torch import Tensor


class PartialOutput:
    """Running attention output of a query block.

    Attributes:
        out: ``[rows, batch, heads, v_head_dim]`` in the accumulation dtype, normalised over the keys seen so far.
        lse: ``[rows, batch, heads]``, -inf where no key has been seen.
    """

    def __init__(self, shards: int, q: Tensor, v_head_dim: int, dtype: torch.dtype) -> None:
        """For a block of ``shards`` query shards like ``q`` (sbhd)."""
        rows, batch, heads = shards * q.shape[0], *q.shape[1:3]
        self.out = torch.zeros(rows, batch, heads, v_head_dim, dtype=dtype, device=q.device)
        self.lse = torch.full((rows, batch, heads), float("-inf"), dtype=dtype, device=q.device)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merge a tile's result into some rows."""
        running = self.lse[rows]
        total = torch.logaddexp(running, lse)
        self.out[rows].mul_(_weight(running, total)).add_(out * _weight(lse, total))
        running.copy_(total)


def merge_stacked(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial results of the same rows over disjoint keys.

    Args:
        out: ``[parts, rows, batch, heads, v_head_dim]``.
        lse: ``[parts, rows, batch, heads]``.

    Returns:
        (out, lse) without the first dimension.
    """
    total = torch.logsumexp(lse, dim=0)
    return (out * _weight(lse, total)).sum(0), total


def surrogate_output(dout: Tensor, delta: Tensor) -> Tensor:
    """A stand-in for the output with rowsum(dout * stand-in) = delta.

    Flash kernels take the forward output in backward, but use nothing of it beyond that row sum. So a rank
    that has dO and delta of a query block needs no copy of its O: one tensor less on the wire. Of all such
    stand-ins this is the shortest, never longer than the true output, so it cannot overflow where that did not.

    Args:
        dout: ``[rows, batch, heads, v_head_dim]``.
        delta: ``[rows, batch, heads]``, rowsum(dout * out) in the accumulation dtype.
    """
    wide = dout.to(delta.dtype)
    # Scaled by the largest entry first: gradients are small, and their squares would underflow.
    largest = wide.abs().amax(-1, keepdim=True)
    direction = wide / torch.where(largest > 0, largest, 1.0)
    length = direction.square().sum(-1, keepdim=True) * largest
    return (direction * (delta.unsqueeze(-1) / torch.where(length > 0, length, 1.0))).to(dout.dtype)


def _weight(part: Tensor, total: Tensor) -> Tensor:
    """exp(part - total) with a last dimension to broadcast; 0 where nothing has been seen at all."""
    return torch.exp(part - torch.where(total == float("-inf"), 0.0, total)).unsqueeze(-1)
