"""The reference kernel for tests, which computes the whole score matrix in the accumulation dtype on any device."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_wallfacer.kernels.prepared import BackwardCall, ForwardCall, PreparedKernel, TensorKind
from megatron_wallfacer.kernels.protocol import AttnSpec, Capabilities, accumulation_dtype
from megatron_wallfacer.schedule.attn_tile import AttnTile, TileWindow, documents_of

_CAUSAL = TileWindow(None, 0)


class ReferenceKernel(PreparedKernel):
    """Softmax attention for any head dims, dtype, window and softcap. The score matrix needs rows x columns elements.

    The kernel computes the documents of ``cu_seqlens`` one by one.
    """

    name = "reference"
    capabilities = Capabilities(v_head_dim=True, softcap=True, window=True, varlen=True)

    def pieces(self, tile: AttnTile) -> list[AttnTile]:
        """See :meth:`PreparedKernel.pieces`."""
        return [] if tile.cu_seqlens is None else documents_of(tile)

    def prepare_forward(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> ForwardCall:
        """See :meth:`PreparedKernel.prepare_forward`."""
        return partial(_forward, _CAUSAL if tile.causal else tile.window, spec)

    def prepare_backward(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> BackwardCall:
        """See :meth:`PreparedKernel.prepare_backward`."""
        return partial(_backward, _CAUSAL if tile.causal else tile.window, spec)


def _forward(window: TileWindow | None, spec: AttnSpec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores, _ = _scores(q, k, window, spec)
    lse_bgrq = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse_bgrq.unsqueeze(-1))
    out = torch.einsum("bgrqk,kbgd->qbgrd", weights, v.to(weights.dtype)).flatten(2, 3)
    return out.to(q.dtype), lse_bgrq.permute(3, 0, 1, 2).flatten(2, 3)


def _backward(
    window: TileWindow | None, spec: AttnSpec, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, groups = accumulation_dtype(q.dtype), k.shape[2]
    scores, slope = _scores(q, k, window, spec)
    weights = torch.exp(scores - _grouped(lse, groups).permute(1, 2, 3, 0).unsqueeze(-1))
    dout_g, q_g, out_g = (_grouped(x.to(dtype), groups) for x in (dout, q, out))
    dv = torch.einsum("bgrqk,qbgrd->kbgd", weights, dout_g)
    delta = (dout_g * out_g).sum(-1).permute(1, 2, 3, 0).unsqueeze(-1)
    dscores = weights * (torch.einsum("qbgrd,kbgd->bgrqk", dout_g, v.to(dtype)) - delta) * slope * spec.scale
    dq = torch.einsum("bgrqk,kbgd->qbgrd", dscores, k.to(dtype)).flatten(2, 3)
    dk = torch.einsum("bgrqk,qbgrd->kbgd", dscores, q_g)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Return ``[s, b, q_heads, ...]`` as ``[s, b, kv_heads, q_heads / kv_heads, ...]``."""
    return x.unflatten(2, (groups, -1))


def _scores(q: Tensor, k: Tensor, window: TileWindow | None, spec: AttnSpec) -> tuple[Tensor, Tensor | float]:
    """Return the scores ``[b, kv_heads, q_per_kv_head, rows, cols]`` and the derivative of softcap for each score."""
    dtype = accumulation_dtype(q.dtype)
    scores = torch.einsum("qbgrd,kbgd->bgrqk", _grouped(q.to(dtype), k.shape[2]), k.to(dtype)) * spec.scale
    slope: Tensor | float = 1.0
    if spec.softcap:
        capped = torch.tanh(scores / spec.softcap)
        scores, slope = capped * spec.softcap, 1.0 - capped.square()
    if window is None:
        return scores, slope
    masked = ~unmasked_pairs(window, *scores.shape[-2:], device=scores.device)
    return scores.masked_fill(masked, float("-inf")), slope


def unmasked_pairs(window: TileWindow, rows: int, cols: int, *, device: torch.device) -> Tensor:
    """Return booleans ``[rows, cols]`` that are True for the pairs inside a window."""
    apart = torch.arange(cols, device=device) - torch.arange(rows, device=device).unsqueeze(-1)
    left = rows if window.left is None else window.left
    right = cols if window.right is None else window.right
    return (apart >= -left) & (apart <= right)
