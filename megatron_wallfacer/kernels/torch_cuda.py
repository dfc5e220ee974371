"""PyTorch's own fused attention on a GPU: its copy of FlashAttention 2, and cuDNN. Nothing else need be installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels.fused import FusedKernel, Limits, TileOptions
from megatron_wallfacer.kernels.layouts import bhsd, lse_bhs, lse_sbh, sbhd, swapped
from megatron_wallfacer.kernels.protocol import Inputs
from megatron_wallfacer.kernels.windows import Window, bottom_right
from megatron_wallfacer.schedule.mask import Band


class TorchFlashKernel(FusedKernel):
    """``aten::_flash_attention_forward`` and ``_backward``: bshd, with windows as in FlashAttention 2.

    Their arguments are given in order: names and meanings of the random state, which is not used, differ by release.

    Args:
        aten: where the operators are; PyTorch's unless given.
        deterministic: not asked here: the operators look at ``torch.use_deterministic_algorithms``.
    """

    name = "torch"
    limits = Limits()

    def __init__(self, aten: Any = torch.ops.aten, *, deterministic: bool | None = None) -> None:
        super().__init__(deterministic=deterministic)
        self._aten = aten

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, tile: TileOptions) -> tuple[Tensor, Tensor]:
        rows, cols = q.shape[0], k.shape[0]
        tensors = (swapped(q), swapped(k), swapped(v))
        out, lse, *_ = self._aten._flash_attention_forward(
            *tensors,
            None,
            None,
            rows,
            cols,
            0.0,
            tile.causal,
            False,
            scale=tile.scale,
            **_window(tile.band, rows, cols),
        )
        return swapped(out), lse_sbh(lse)

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: TileOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, cols = q.shape[0], k.shape[0]
        tensors = [swapped(x) for x in (dout, q, k, v, out)]
        lengths = (None, None, rows, cols)
        random = (_no_seed(q), _no_seed(q))
        grads = self._aten._flash_attention_backward(
            *tensors,
            lse_bhs(lse),
            *lengths,
            0.0,
            tile.causal,
            *random,
            scale=tile.scale,
            **_window(tile.band, rows, cols),
        )
        dq, dk, dv = (swapped(x) for x in grads)
        return dq, dk, dv


class TorchCudnnKernel(FusedKernel):
    """``aten::_scaled_dot_product_cudnn_attention`` and its backward: bhsd, without windows.

    Args:
        aten: where the operators are; PyTorch's unless given.
        deterministic: see :class:`FusedKernel`; refused, its backward is not.
    """

    name = "cudnn"
    limits = Limits(v_head_dim=True, bands=False)

    def __init__(self, aten: Any = torch.ops.aten, *, deterministic: bool | None = None) -> None:
        super().__init__(deterministic=deterministic)
        self._aten = aten
        #: Whether the lse of this release is [b, h, s, 1] and not [b, h, s]: backward wants what forward gave.
        self._lse_has_width = False

    def refusal(self, inputs: Inputs) -> str | None:
        refusal = super().refusal(inputs)
        if refusal is None and self.deterministic:
            return "its gradients do not repeat bit by bit, and deterministic ones are asked for"
        return refusal

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, tile: TileOptions) -> tuple[Tensor, Tensor]:
        _refuse(tile.band, q.shape[0], k.shape[0])
        tensors = (bhsd(q), bhsd(k), bhsd(v))
        out, lse, *_ = self._aten._scaled_dot_product_cudnn_attention(
            *tensors, None, True, 0.0, tile.causal, False, scale=tile.scale
        )
        self._lse_has_width = lse.dim() == 4
        return sbhd(out), lse_sbh(lse.squeeze(-1) if self._lse_has_width else lse)

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: TileOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, cols = q.shape[0], k.shape[0]
        _refuse(tile.band, rows, cols)
        tensors = [bhsd(x) for x in (dout, q, k, v, out)]
        stats = lse_bhs(lse).unsqueeze(-1) if self._lse_has_width else lse_bhs(lse)
        # No bias, and no lengths of packed sequences.
        absent = (None, None, None)
        random = (_no_seed(q), _no_seed(q))
        grads = self._aten._scaled_dot_product_cudnn_attention_backward(
            *tensors, stats, *random, *absent, rows, cols, 0.0, tile.causal, scale=tile.scale
        )
        dq, dk, dv = (sbhd(x) for x in grads)
        return dq, dk, dv


def _window(band: Band | None, rows: int, cols: int) -> dict[str, int | None]:
    window = bottom_right(band, rows, cols)
    return {"window_size_left": window.left, "window_size_right": window.right}


def _refuse(band: Band | None, rows: int, cols: int) -> None:
    if bottom_right(band, rows, cols) != Window():
        raise OptionError("kernel", "cudnn", f"flash or torch here, because cudnn has no window for {band}")


def _no_seed(like: Tensor) -> Tensor:
    """State of the dropout that there is not: an argument that has to be a tensor."""
    return torch.empty((), dtype=torch.int64, device=like.device)
