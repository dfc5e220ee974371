"""FlashAttention 3 (``hopper`` of the flash-attention repository): as FlashAttention 2, for Hopper."""

from __future__ import annotations

from typing import Any

from megatron_wallfacer.kernels.flash import PACKING, FlashKernel, Options
from megatron_wallfacer.kernels.fused import Limits
from megatron_wallfacer.kernels.optional import FLASH_ATTN_3
from megatron_wallfacer.kernels.signatures import Callee, Neutral

#: Of caches and fp8. In releases up to 2.8.3 they have no defaults. ``sequed`` is how they spell it.
_UNUSED_FORWARD = (
    *("k_new", "v_new", "qv", "out", "cu_seqlens_k_new", "seqused_q", "seqused_k", "page_table", "kv_batch_idx"),
    *("leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale"),
)
_UNUSED_BACKWARD = ("sequed_q", "sequed_k")


class Flash3Kernel(FlashKernel):
    """``_flash_attn_forward`` and ``_flash_attn_backward`` of ``flash_attn_interface``; see :class:`LibraryKernel`."""

    name = "flash3"
    limits = Limits(generations=(9,), softcap=True, v_head_dim=True)
    library = FLASH_ATTN_3
    functions = ("_flash_attn_forward", "_flash_attn_backward")
    needs = "flash-attn-3 as of flash-attention 2.7.4 to 2.8.3 or its main branch"

    def _forward_values(self, callee: Callee, options: Options) -> dict[str, Any]:
        return dict.fromkeys(_UNUSED_FORWARD, Neutral(None)) | _values(callee, options)

    def _backward_values(self, callee: Callee, options: Options) -> dict[str, Any]:
        unused = dict.fromkeys(_UNUSED_BACKWARD, Neutral(None))
        return unused | {"deterministic": self.deterministic} | _values(callee, options)


def _values(callee: Callee, options: Options) -> dict[str, Any]:
    """What both directions are told of one tile. The main branch says is_causal in one of them, 2.8.3 does not."""
    sizes = options.window.arguments(as_pair=callee.has("window_size"))
    causal = {"is_causal" if callee.has("is_causal") else "causal": options.causal}
    return dict.fromkeys(PACKING) | causal | sizes | {"softmax_scale": options.scale, "softcap": options.softcap}
