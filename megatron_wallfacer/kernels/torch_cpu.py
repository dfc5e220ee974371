"""PyTorch's own flash attention on a CPU: fp64, fp32, bf16 and fp16, native GQA."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_wallfacer.kernels.layouts import bhsd, sbhd
from megatron_wallfacer.kernels.protocol import Inputs
from megatron_wallfacer.kernels.reference import live_pairs
from megatron_wallfacer.schedule.mask import Band

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
#: Rows of a band that are one call: what stands outside the band in their columns is computed in vain.
_STRIP = 128


class TorchCpuKernel:
    """The CPU flash op of PyTorch. Its non-square causal mask is aligned top-left, so causal tiles must be square.

    It wants head dims to be equal: the narrower of q, k and v is padded with zeros, which changes no result.
    """

    name = "torch"

    def refusal(self, inputs: Inputs) -> str | None:
        if inputs.device.type != "cpu":
            return f"it runs on a CPU, the tensors are on {inputs.device.type}"
        return f"it does not cap logits, softcap is {inputs.softcap}" if inputs.softcap else None

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
    ) -> tuple[Tensor, Tensor]:
        v_head_dim = v.shape[-1]
        q, k, v = _equally_wide(q, k, v)
        if band is None:
            out_bhsd, lse_bhs = _flash(bhsd(q), bhsd(k), bhsd(v), 0.0, causal, scale=scale)
            return sbhd(out_bhsd)[..., :v_head_dim], lse_bhs.permute(2, 0, 1)
        parts = [
            _flash(bhsd(q[rows]), bhsd(k[cols]), bhsd(v[cols]), 0.0, False, attn_mask=bias, scale=scale)
            for rows, cols, bias in _strips(band, q, k)
        ]
        out_bhsd, lse_bhs = (torch.cat(pieces, dim=2) for pieces in zip(*parts, strict=True))
        return sbhd(out_bhsd)[..., :v_head_dim], lse_bhs.permute(2, 0, 1)

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        head_dim, v_head_dim = q.shape[-1], v.shape[-1]
        dout, q, k, v, out = _equally_wide(dout, q, k, v, out)
        if band is None:
            dq, dk, dv = _gradients(dout, q, k, v, out, lse, causal=causal, scale=scale)
        else:
            # Strips share keys: their parts are added up in the accumulation dtype.
            dq, (dk, dv) = torch.empty_like(q), (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
            for rows, cols, bias in _strips(band, q, k):
                dq[rows], dk_part, dv_part = _gradients(
                    dout[rows], q[rows], k[cols], v[cols], out[rows], lse[rows], bias=bias, scale=scale
                )
                dk[cols] += dk_part
                dv[cols] += dv_part
            dk, dv = dk.to(k.dtype), dv.to(v.dtype)
        return dq[..., :head_dim], dk[..., :head_dim], dv[..., :v_head_dim]


def _gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _flash_backward(
        *(bhsd(x) for x in (dout, q, k, v, out)), lse.permute(1, 2, 0), 0.0, causal, attn_mask=bias, scale=scale
    )
    return sbhd(dq), sbhd(dk), sbhd(dv)


def _strips(band: Band, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows of a band in strips: (rows, the columns that they see, what is added to the scores)."""
    for first in range(0, q.shape[0], _STRIP):
        end = min(first + _STRIP, q.shape[0])
        start = 0 if band.lower is None else max(0, first + band.lower)
        stop = k.shape[0] if band.upper is None else min(k.shape[0], end + band.upper)
        live = live_pairs(band, end - first, stop, device=q.device, first_row=first)[:, start:]
        bias = torch.zeros(live.shape, dtype=q.dtype, device=q.device).masked_fill_(~live, float("-inf"))
        yield slice(first, end), slice(start, stop), bias


def _equally_wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    widest = max(x.shape[-1] for x in tensors)
    return tuple(x if x.shape[-1] == widest else pad(x, (0, widest - x.shape[-1])) for x in tensors)
