"""FlashAttention 4 (package flash-attn-4, ``flash_attn.cute``): as FlashAttention 2, for Hopper and Blackwell.

No limit of a window is None here. -1 is a window that ends before it begins: zeros without a word.
"""

from __future__ import annotations

from typing import Any

from megatron_wallfacer.kernels.flash import FlashKernel, Options
from megatron_wallfacer.kernels.fused import Limits
from megatron_wallfacer.kernels.optional import FLASH_ATTN_4
from megatron_wallfacer.kernels.signatures import Callee


class Flash4Kernel(FlashKernel):
    """``_flash_attn_fwd`` and ``_flash_attn_bwd`` of ``flash_attn.cute.interface``; see :class:`LibraryKernel`."""

    name = "flash4"
    limits = Limits(generations=(9, 10), softcap=True, v_head_dim=True)
    library = FLASH_ATTN_4
    functions = ("_flash_attn_fwd", "_flash_attn_bwd")
    needs = "flash-attn-4 >= 4.0.0b4"
    lse_name = "lse"

    def _forward_values(self, callee: Callee, options: Options) -> dict[str, Any]:
        # No cap is None in this direction, 0.0 in the other.
        return {"softcap": options.softcap or None, "return_lse": True} | _values(options)

    def _backward_values(self, callee: Callee, options: Options) -> dict[str, Any]:
        return {"softcap": options.softcap, "deterministic": self.deterministic} | _values(options)


def _values(options: Options) -> dict[str, Any]:
    sides = {"window_size_left": options.window.left, "window_size_right": options.window.right}
    return {"softmax_scale": options.scale, "causal": options.causal} | sides
