"""PyTorch's own flash attention on a CPU: fp64, fp32, bf16 and fp16, native GQA."""

from __future__ import annotations

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class TorchCpuKernel:
    """The CPU flash op of PyTorch. Its non-square causal mask is aligned top-left, so causal tiles must be square."""

    name = "torch"

    def refusal(self, *, device: torch.device, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> str | None:
        if device.type != "cpu":
            return f"it runs on a CPU, the tensors are on {device.type}"
        if head_dim != v_head_dim:
            return f"it needs equal head dims, q and k have {head_dim}, v has {v_head_dim}"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out_bhsd, lse_bhs = _flash(_bhsd(q), _bhsd(k), _bhsd(v), 0.0, causal, scale=scale)
        return _sbhd(out_bhsd), lse_bhs.permute(2, 0, 1)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _flash_backward(
            _bhsd(dout), _bhsd(q), _bhsd(k), _bhsd(v), _bhsd(out), lse.permute(1, 2, 0), 0.0, causal, scale=scale
        )
        return _sbhd(dq), _sbhd(dk), _sbhd(dv)


def _bhsd(x_sbhd: Tensor) -> Tensor:
    return x_sbhd.permute(1, 2, 0, 3)


def _sbhd(x_bhsd: Tensor) -> Tensor:
    return x_bhsd.permute(2, 0, 1, 3)
