"""FlashAttention 2 (package flash-attn)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_wallfacer.kernels.flash import FlashKernel, Options
from megatron_wallfacer.kernels.fused import Limits
from megatron_wallfacer.kernels.optional import FLASH_ATTN_2
from megatron_wallfacer.kernels.signatures import Callee


class Flash2Kernel(FlashKernel):
    """``_flash_attn_forward`` and ``_backward`` of flash-attn, and ``varlen`` ones; see :class:`LibraryKernel`."""

    name = "flash2"
    limits = Limits(softcap=True)
    library = FLASH_ATTN_2
    functions = ("_flash_attn_forward", "_flash_attn_backward")
    packed_functions = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
    needs = "flash-attn >= 2.6, < 3"

    def _out_and_lse(self, found: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        # Up to 2.6 the inputs are given back, too: (out, q, k, v, out_padded, lse, ...), later (out, lse, ...).
        return found[0], found[5] if len(found) == 8 else found[1]

    def _forward_values(self, callee: Callee, options: Options) -> dict[str, Any]:
        return {"return_softmax": False} | _values(callee, options)

    def _backward_values(self, callee: Callee, options: Options) -> dict[str, Any]:
        return {"deterministic": self.deterministic} | _values(callee, options)


def _values(callee: Callee, options: Options) -> dict[str, Any]:
    """What both directions are told. The cap of logits is there from 2.6 on, with an lse that is as we read it."""
    sizes = options.window.arguments(as_pair=callee.has("window_size"))
    numbers = {"softmax_scale": options.scale, "softcap": options.softcap, "dropout_p": 0.0}
    return numbers | sizes | {"causal": options.causal, "alibi_slopes": None}
