"""Attention written out, for checking: the whole score matrix, in the accumulation dtype, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_wallfacer.kernels.protocol import accumulation_dtype


class ReferenceKernel:
    """Plain softmax attention. Memory grows with rows x cols; any head dims, any dtype."""

    name = "reference"

    def refusal(self, *, device: torch.device, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        scores = _scores(q, k, causal, scale)
        lse_bgrq = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse_bgrq.unsqueeze(-1))
        out = torch.einsum("bgrqk,kbgd->qbgrd", weights, v.to(weights.dtype)).flatten(2, 3)
        return out.to(q.dtype), lse_bgrq.permute(3, 0, 1, 2).flatten(2, 3)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, groups = accumulation_dtype(q.dtype), k.shape[2]
        weights = torch.exp(_scores(q, k, causal, scale) - _grouped(lse, groups).permute(1, 2, 3, 0).unsqueeze(-1))
        dout_g, q_g, out_g = (_grouped(x.to(dtype), groups) for x in (dout, q, out))
        dv = torch.einsum("bgrqk,qbgrd->kbgd", weights, dout_g)
        delta = (dout_g * out_g).sum(-1).permute(1, 2, 3, 0).unsqueeze(-1)
        dscores = weights * (torch.einsum("qbgrd,kbgd->bgrqk", dout_g, v.to(dtype)) - delta) * scale
        dq = torch.einsum("bgrqk,kbgd->qbgrd", dscores, k.to(dtype)).flatten(2, 3)
        dk = torch.einsum("bgrqk,qbgrd->kbgd", dscores, q_g)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[s, b, q_heads, ...] -> [s, b, kv_heads, q_heads / kv_heads, ...]."""
    return x.unflatten(2, (groups, -1))


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """Scaled and masked scores [b, kv_heads, q_heads / kv_heads, rows, cols] in the accumulation dtype."""
    dtype = accumulation_dtype(q.dtype)
    scores = torch.einsum("qbgrd,kbgd->bgrqk", _grouped(q.to(dtype), k.shape[2]), k.to(dtype)) * scale
    if not causal:
        return scores
    above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(above, float("-inf"))
