"""Attention written out, for checking: the whole score matrix, in the accumulation dtype, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_wallfacer.kernels.protocol import Inputs, accumulation_dtype
from megatron_wallfacer.schedule.mask import Band, Lengths

_CAUSAL = Band(None, 0)


class ReferenceKernel:
    """Plain softmax attention. Memory grows with rows x cols; any head dims, dtype, band and softcap.

    Packed documents are computed one after the other: what a packed call of a library is held against.
    """

    name = "reference"
    packs = True

    def refusal(self, inputs: Inputs) -> str | None:
        return None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        scale: float,
        band: Band | None = None,
        softcap: float = 0.0,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor, Tensor]:
        if lengths is not None:
            documents = _documents(lengths, q=q, k=k, v=v)
            parts = [self.forward(**tensors, causal=causal, scale=scale, softcap=softcap) for tensors in documents]
            out, lse = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
            return out, lse
        scores, _ = _scores(q, k, _CAUSAL if causal else band, scale, softcap)
        lse_bgrq = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse_bgrq.unsqueeze(-1))
        out = torch.einsum("bgrqk,kbgd->qbgrd", weights, v.to(weights.dtype)).flatten(2, 3)
        return out.to(q.dtype), lse_bgrq.permute(3, 0, 1, 2).flatten(2, 3)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
        band: Band | None = None,
        softcap: float = 0.0,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if lengths is not None:
            documents = _documents(lengths, dout=dout, q=q, k=k, v=v, out=out, lse=lse)
            parts = [self.backward(**tensors, causal=causal, scale=scale, softcap=softcap) for tensors in documents]
            dq, dk, dv = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
            return dq, dk, dv
        dtype, groups = accumulation_dtype(q.dtype), k.shape[2]
        scores, slope = _scores(q, k, _CAUSAL if causal else band, scale, softcap)
        weights = torch.exp(scores - _grouped(lse, groups).permute(1, 2, 3, 0).unsqueeze(-1))
        dout_g, q_g, out_g = (_grouped(x.to(dtype), groups) for x in (dout, q, out))
        dv = torch.einsum("bgrqk,qbgrd->kbgd", weights, dout_g)
        delta = (dout_g * out_g).sum(-1).permute(1, 2, 3, 0).unsqueeze(-1)
        dscores = weights * (torch.einsum("qbgrd,kbgd->bgrqk", dout_g, v.to(dtype)) - delta) * slope * scale
        dq = torch.einsum("bgrqk,kbgd->qbgrd", dscores, k.to(dtype)).flatten(2, 3)
        dk = torch.einsum("bgrqk,qbgrd->kbgd", dscores, q_g)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _documents(lengths: Lengths, **tensors: Tensor) -> Iterator[dict[str, Tensor]]:
    """These tensors of one document after the other."""
    sides = (lengths.cols if name in ("k", "v") else lengths.rows for name in tensors)
    pieces = (x.split(side) for x, side in zip(tensors.values(), sides, strict=True))
    return (dict(zip(tensors, document, strict=True)) for document in zip(*pieces, strict=True))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[s, b, q_heads, ...] -> [s, b, kv_heads, q_heads / kv_heads, ...]."""
    return x.unflatten(2, (groups, -1))


def _scores(q: Tensor, k: Tensor, band: Band | None, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """Scaled, capped and masked scores [b, kv_heads, q_heads / kv_heads, rows, cols] in the accumulation dtype, and the
    derivative of the cap."""
    dtype = accumulation_dtype(q.dtype)
    scores = torch.einsum("qbgrd,kbgd->bgrqk", _grouped(q.to(dtype), k.shape[2]), k.to(dtype)) * scale
    slope: Tensor | float = 1.0
    if softcap:
        capped = torch.tanh(scores / softcap)
        scores, slope = capped * softcap, 1.0 - capped.square()
    if band is None:
        return scores, slope
    return scores.masked_fill(~live_pairs(band, *scores.shape[-2:], device=scores.device), float("-inf")), slope


def live_pairs(band: Band, rows: int, cols: int, *, device: torch.device, first_row: int = 0) -> Tensor:
    """A band as booleans ``[rows, cols]``, the rows counted from ``first_row``."""
    apart = torch.arange(cols, device=device) - torch.arange(first_row, first_row + rows, device=device).unsqueeze(-1)
    lower = -rows - first_row if band.lower is None else band.lower
    upper = cols if band.upper is None else band.upper
    return (apart >= lower) & (apart <= upper)
