"""Kernel calls of a tile of which only some pairs are live: documents, windows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine.merge import merge_into
from megatron_wallfacer.kernels.protocol import Kernel, accumulation_dtype
from megatron_wallfacer.schedule.batches import batches
from megatron_wallfacer.schedule.mask import KernelCall, Mask


# A training run asks for the same tiles in every layer.
@lru_cache(maxsize=8192)
def calls_of(
    mask: Mask, q_chunks: tuple[int, ...], k_chunks: tuple[int, ...], cp_size: int, size: int, packs: bool
) -> tuple[KernelCall, ...]:
    """See :meth:`Mask.calls`.

    Args:
        mask, q_chunks, k_chunks, cp_size, size: of it.
        packs: the kernel takes several documents in one call.
    """
    calls = mask.calls(q_chunks, k_chunks, cp_size, size)
    return batches(calls) if packs else calls


def forward(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, calls: Sequence[KernelCall], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Output and lse of a tile, as a kernel gives them; rows that see nothing are 0 and -inf.

    Args:
        kernel: the local kernel.
        q, k, v: sbhd rows and columns of the tile.
        calls: what is live, rows and columns counted in the tile.
        options: of the kernel.
    """
    if len(calls) == 1 and _covers(calls[0], q, k):
        return kernel.forward(q, k, v, **_live(calls[0]), **options)
    dtype = accumulation_dtype(q.dtype)
    out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=dtype)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
    for call in calls:
        rows, cols = slice(*call.rows), slice(*call.cols)
        merge_into(out[rows], lse[rows], *kernel.forward(q[rows], k[cols], v[cols], **_live(call), **options))
    return out, lse


def backward(
    kernel: Kernel, tensors: dict[str, Tensor], calls: Sequence[KernelCall], options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The tile's part of dq, dk, dv.

    Args:
        kernel: the local kernel.
        tensors: ``dout q out lse`` of the rows, ``k v`` of the columns, as a kernel takes them.
        calls: what is live, rows and columns counted in the tile.
        options: of the kernel.
    """
    row_names, dtype = ("dout", "q", "out", "lse"), tensors["lse"].dtype
    dq, dk, dv = (torch.zeros_like(tensors[name], dtype=dtype) for name in ("q", "k", "v"))
    for call in calls:
        rows, cols = slice(*call.rows), slice(*call.cols)
        dout, q, out, lse = (tensors[name][rows] for name in row_names)
        k, v = tensors["k"][cols], tensors["v"][cols]
        parts = kernel.backward(dout, q, k, v, out, lse, **_live(call), **options)
        for total, where, part in zip((dq, dk, dv), (rows, cols, cols), parts, strict=True):
            total[where] += part
    return dq, dk, dv


def _live(call: KernelCall) -> dict[str, Any]:
    """What of it is live, as a kernel is told: for most calls neither a band nor lengths, which not all know."""
    more = {"band": call.band, "lengths": call.lengths}
    return {"causal": call.causal} | {name: value for name, value in more.items() if value is not None}


def _covers(call: KernelCall, q: Tensor, k: Tensor) -> bool:
    return call.rows == (0, q.shape[0]) and call.cols == (0, k.shape[0])
