"""A tile computed as several: strips of a window, documents. Their rows follow one another and cover the tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel
from megatron_wallfacer.schedule.attn_tile import AttnTile


def forward_in_pieces(
    kernel: Kernel, pieces: Sequence[AttnTile], spec: AttnSpec, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of a tile; see :meth:`Kernel.forward`.

    Args:
        kernel: kernel that computes each piece.
        pieces: tiles whose rows and columns are counted in q and k.
        spec: scale and softcap.
        q, k, v: sbhd, of the whole tile.
    """
    parts = [
        kernel.forward(q[slice(*piece.rows)], k[slice(*piece.cols)], v[slice(*piece.cols)], piece, spec)
        for piece in pieces
    ]
    out, lse = (torch.cat(rows) for rows in zip(*parts, strict=True))
    return out, lse


def backward_in_pieces(
    kernel: Kernel,
    pieces: Sequence[AttnTile],
    spec: AttnSpec,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of a tile; see :meth:`Kernel.backward` and :func:`forward_in_pieces`.

    Strips share columns: their parts of dk and dv are summed in the accumulation dtype.
    """
    dq, (dk, dv) = torch.empty_like(q), (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
    for piece in pieces:
        rows, cols = slice(*piece.rows), slice(*piece.cols)
        dq[rows], dk_part, dv_part = kernel.backward(
            dout[rows], q[rows], k[cols], v[cols], out[rows], lse[rows], piece, spec
        )
        dk[cols] += dk_part
        dv[cols] += dv_part
    return dq, dk.to(k.dtype), dv.to(v.dtype)
