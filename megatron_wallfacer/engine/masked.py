"""Kernel calls of a tile of which only some pairs are live: documents, windows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from megatron_wallfacer.engine.merge import merge_into
from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel, accumulation_dtype
from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.batches import batches
from megatron_wallfacer.schedule.mask import Mask


# A training run asks for the same tiles in every layer.
@lru_cache(maxsize=8192)
def calls_of(
    mask: Mask, q_chunks: tuple[int, ...], k_chunks: tuple[int, ...], cp_size: int, size: int, varlen: bool
) -> tuple[AttnTile, ...]:
    """See :meth:`Mask.calls`.

    Args:
        mask, q_chunks, k_chunks, cp_size, size: of it.
        varlen: the kernel takes several documents in one call.
    """
    calls = mask.calls(q_chunks, k_chunks, cp_size, size)
    return batches(calls) if varlen else calls


def forward(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, calls: Sequence[AttnTile], spec: AttnSpec
) -> tuple[Tensor, Tensor]:
    """Output and lse of a tile, as a kernel gives them; rows that see nothing are 0 and -inf.

    Args:
        kernel: the local kernel.
        q, k, v: sbhd rows and columns of the tile.
        calls: what is live, rows and columns counted in the tile.
        spec: scale and softcap.
    """
    if len(calls) == 1 and _covers(calls[0], q, k):
        return kernel.forward(q, k, v, calls[0], spec)
    dtype = accumulation_dtype(q.dtype)
    out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=dtype)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
    for call in calls:
        rows, cols = slice(*call.rows), slice(*call.cols)
        merge_into(out[rows], lse[rows], *kernel.forward(q[rows], k[cols], v[cols], call, spec))
    return out, lse


def backward(
    kernel: Kernel, tensors: dict[str, Tensor], calls: Sequence[AttnTile], spec: AttnSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """The tile's part of dq, dk, dv.

    Args:
        kernel: the local kernel.
        tensors: ``dout q out lse`` of the rows, ``k v`` of the columns, as a kernel takes them.
        calls: what is live, rows and columns counted in the tile.
        spec: scale and softcap.
    """
    row_names, dtype = ("dout", "q", "out", "lse"), tensors["lse"].dtype
    dq, dk, dv = (torch.zeros_like(tensors[name], dtype=dtype) for name in ("q", "k", "v"))
    for call in calls:
        rows, cols = slice(*call.rows), slice(*call.cols)
        dout, q, out, lse = (tensors[name][rows] for name in row_names)
        k, v = tensors["k"][cols], tensors["v"][cols]
        parts = kernel.backward(dout, q, k, v, out, lse, call, spec)
        for total, where, part in zip((dq, dk, dv), (rows, cols, cols), parts, strict=True):
            total[where] += part
    return dq, dk, dv


def _covers(call: AttnTile, q: Tensor, k: Tensor) -> bool:
    return call.rows == (0, q.shape[0]) and call.cols == (0, k.shape[0])
