"""PyTorch's flash attention on a CPU for fp64, fp32, bf16 and fp16, with native GQA."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_wallfacer.kernels.prepared import BackwardCall, ForwardCall, PreparedKernel, TensorKind
from megatron_wallfacer.kernels.protocol import AttnSpec, Capabilities
from megatron_wallfacer.kernels.reference import unmasked_pairs
from megatron_wallfacer.kernels.windows import strips
from megatron_wallfacer.schedule.attn_tile import AttnTile, documents_of

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
#: Rows of a call for a tile with a window. The operator also computes the masked pairs of a strip's columns.
_STRIP = 128


class TorchCpuKernel(PreparedKernel):
    """PyTorch's CPU flash operator. Its causal mask starts at the top-left corner, so causal tiles must be square.

    The operator requires equal head dims. Smaller head dims are padded with zeros, which does not change the result.
    """

    name = "torch"
    capabilities = Capabilities(("cpu",), v_head_dim=True, window=True)

    def pieces(self, tile: AttnTile) -> list[AttnTile]:
        """See :meth:`PreparedKernel.pieces`."""
        if tile.cu_seqlens is not None:
            return documents_of(tile)
        return strips(tile, _STRIP) if tile.window is not None and tile.height > _STRIP else []

    def prepare_forward(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> ForwardCall:
        """See :meth:`PreparedKernel.prepare_forward`."""
        return partial(_forward, tile, spec.scale)

    def prepare_backward(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> BackwardCall:
        """See :meth:`PreparedKernel.prepare_backward`."""
        return partial(_backward, tile, spec.scale)


def _forward(tile: AttnTile, scale: float, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    v_head_dim = v.shape[-1]
    if q.shape[-1] != v_head_dim:
        q, k, v = _equally_wide(q, k, v)
    q, k, v = q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
    bias = None if tile.window is None else _bias(tile, q)
    out_bhsd, lse_bhs = _flash(q, k, v, 0.0, tile.causal, attn_mask=bias, scale=scale)
    return out_bhsd.permute(2, 0, 1, 3)[..., :v_head_dim], lse_bhs.permute(2, 0, 1)


def _backward(
    tile: AttnTile, scale: float, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    head_dim, v_head_dim = q.shape[-1], v.shape[-1]
    if head_dim != v_head_dim:
        dout, q, k, v, out = _equally_wide(dout, q, k, v, out)
    tensors = [x.permute(1, 2, 0, 3) for x in (dout, q, k, v, out)]
    bias = None if tile.window is None else _bias(tile, q)
    dq, dk, dv = _flash_backward(*tensors, lse.permute(1, 2, 0), 0.0, tile.causal, attn_mask=bias, scale=scale)
    dq, dk, dv = dq.permute(2, 0, 1, 3), dk.permute(2, 0, 1, 3), dv.permute(2, 0, 1, 3)
    return dq[..., :head_dim], dk[..., :head_dim], dv[..., :v_head_dim]


def _bias(tile: AttnTile, q: Tensor) -> Tensor:
    """Return the bias of the scores ``[rows, cols]``: 0, or -inf for masked pairs. The bias is too large to cache."""
    masked = ~unmasked_pairs(tile.window, tile.height, tile.width, device=q.device)
    bias = torch.zeros(masked.shape, dtype=q.dtype, device=q.device)
    return bias.masked_fill_(masked, float("-inf"))


def _equally_wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    widest = max(x.shape[-1] for x in tensors)
    return tuple(x if x.shape[-1] == widest else pad(x, (0, widest - x.shape[-1])) for x in tensors)
