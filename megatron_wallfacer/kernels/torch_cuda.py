"""PyTorch's fused attention on a GPU: its copy of FlashAttention 2, and cuDNN. No other library is needed."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels.prepared import BackwardCall, ForwardCall, PreparedKernel, TensorKind
from megatron_wallfacer.kernels.protocol import FUSED, AttnSpec, Gradients, Inputs
from megatron_wallfacer.kernels.windows import WindowSize, bottom_right
from megatron_wallfacer.schedule.attn_tile import AttnTile


class TorchFlashKernel(PreparedKernel):
    """``aten::_flash_attention_forward`` and ``_backward``: bshd, with windows as in FlashAttention 2.

    Arguments up to the unused random state are positional, because releases of PyTorch name this state differently.
    Gradients are deterministic only if ``torch.use_deterministic_algorithms`` is on. ``deterministic`` has no effect.
    """

    name = "torch"
    capabilities = FUSED

    def __init__(self, aten: Any = torch.ops.aten, *, deterministic: bool | None = None) -> None:
        super().__init__(deterministic=deterministic)
        self._aten = aten

    def prepare_forward(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> ForwardCall:
        """See :meth:`PreparedKernel.prepare_forward`."""
        call, options = self._aten._flash_attention_forward, _options(tile, spec)
        rest = (None, None, tile.height, tile.width, 0.0, tile.causal, False)

        def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, lse, *_ = call(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), *rest, **options)
            return out.transpose(0, 1), lse.permute(2, 0, 1)

        return forward

    def prepare_backward(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> BackwardCall:
        """See :meth:`PreparedKernel.prepare_backward`."""
        call, options, no_seed = self._aten._flash_attention_backward, _options(tile, spec), _no_seed(tensors.device)
        rest = (None, None, tile.height, tile.width, 0.0, tile.causal, no_seed, no_seed)

        def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
            bshd = [x.transpose(0, 1) for x in (dout, q, k, v, out)]
            # PyTorch's operator ignores the strides of the lse.
            dq, dk, dv = call(*bshd, lse.permute(1, 2, 0).contiguous(), *rest, **options)
            return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)

        return backward


class TorchCudnnKernel(PreparedKernel):
    """``aten::_scaled_dot_product_cudnn_attention`` and its backward: bhsd, without windows.

    The backward pass of cuDNN is not deterministic. If deterministic gradients are required, this kernel is
    unavailable.
    """

    name = "cudnn"
    capabilities = replace(FUSED, v_head_dim=True, window=False)

    def __init__(self, aten: Any = torch.ops.aten, *, deterministic: bool | None = None) -> None:
        super().__init__(deterministic=deterministic)
        self._aten = aten
        #: Whether forward's lse is [b, h, s, 1] instead of [b, h, s] in this release. Backward takes the same shape.
        self._lse_has_width = False

    def unsupported_reason(self, inputs: Inputs) -> str | None:
        """See :meth:`Kernel.unsupported_reason`."""
        reason = super().unsupported_reason(inputs)
        if reason is None and self.deterministic:
            return "its gradients do not repeat bit by bit, and deterministic ones are requested"
        return reason

    def prepare_forward(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> ForwardCall:
        """See :meth:`PreparedKernel.prepare_forward`."""
        _require_no_window(tile)
        call, scale = self._aten._scaled_dot_product_cudnn_attention, spec.scale
        rest = (None, True, 0.0, tile.causal, False)

        def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
            out, lse, *_ = call(q, k, v, *rest, scale=scale)
            self._lse_has_width = lse.dim() == 4
            return out.permute(2, 0, 1, 3), (lse.squeeze(-1) if lse.dim() == 4 else lse).permute(2, 0, 1)

        return forward

    def prepare_backward(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> BackwardCall:
        """See :meth:`PreparedKernel.prepare_backward`."""
        _require_no_window(tile)
        call, scale = self._aten._scaled_dot_product_cudnn_attention_backward, spec.scale
        no_seed = _no_seed(tensors.device)
        # The operator gets neither a bias nor boundaries of documents.
        rest = (no_seed, no_seed, None, None, None, tile.height, tile.width, 0.0, tile.causal)

        def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
            bhsd = [x.permute(1, 2, 0, 3) for x in (dout, q, k, v, out)]
            stats = lse.permute(1, 2, 0).contiguous()
            dq, dk, dv = call(*bhsd, stats.unsqueeze(-1) if self._lse_has_width else stats, *rest, scale=scale)
            return dq.permute(2, 0, 1, 3), dk.permute(2, 0, 1, 3), dv.permute(2, 0, 1, 3)

        return backward


def _options(tile: AttnTile, spec: AttnSpec) -> dict[str, Any]:
    size = bottom_right(tile)
    return {"scale": spec.scale, "window_size_left": size.left, "window_size_right": size.right}


def _require_no_window(tile: AttnTile) -> None:
    if bottom_right(tile) != WindowSize():
        raise OptionError(
            "kernel", "cudnn", f"flash or torch here, because cudnn does not support the window {tile.window}"
        )


@lru_cache(maxsize=64)
def _no_seed(device: torch.device) -> Tensor:
    """Return a placeholder for the random state of dropout, which the operator requires although dropout is off."""
    return torch.zeros((), dtype=torch.int64, device=device)
