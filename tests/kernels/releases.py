"""Parameters of a few releases of each library, short: what is tested without a network.

Their published sources, of more releases, are read by ``test_contracts.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from megatron_wallfacer.kernels import flash
from megatron_wallfacer.kernels.prepared import PreparedKernel
from megatron_wallfacer.kernels.te import TransformerEngineKernel
from megatron_wallfacer.kernels.torch_cuda import TorchCudnnKernel, TorchFlashKernel
from tests.kernels import fakes

_VARLEN = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
FLASH2 = {
    "flash-attn 2.5.9": (
        "_flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_softmax)"
        " -> (out, q, k, v, out_padded, softmax_lse, S_dmask, rng_state)",
        "_flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,"
        " window_size, alibi_slopes, deterministic, rng_state=None) -> (dq, dk, dv, softmax_d)",
        f"_flash_attn_varlen_forward(q, k, v, {_VARLEN}, dropout_p, softmax_scale, causal) -> (out, q, softmax_lse)",
        f"_flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, {_VARLEN}) -> (dq, dk, dv)",
    ),
    "flash-attn 2.6.3": (
        "_flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,"
        " return_softmax) -> (out, q, k, v, out_padded, softmax_lse, S_dmask, rng_state)",
        "_flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,"
        " window_size, softcap, alibi_slopes, deterministic, rng_state=None) -> (dq, dk, dv, softmax_d)",
        f"_flash_attn_varlen_forward(q, k, v, {_VARLEN}, dropout_p, softmax_scale, causal, window_size=(-1, -1),"
        " softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None)"
        " -> (out, q, k, v, out_padded, softmax_lse, S_dmask, rng_state)",
        f"_flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, {_VARLEN}, dropout_p,"
        " softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, rng_state=None)"
        " -> (dq, dk, dv, softmax_d)",
    ),
    "flash-attn 2.8.3": (
        "_flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,"
        " alibi_slopes, return_softmax) -> (out, softmax_lse, S_dmask, rng_state)",
        "_flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,"
        " window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None) -> softmax_d",
        f"_flash_attn_varlen_forward(q, k, v, {_VARLEN}, dropout_p, softmax_scale, causal, window_size_left=-1,"
        " window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,"
        " leftpad_k=None, seqused_k=None, zero_tensors=False) -> (out, softmax_lse, S_dmask, rng_state)",
        f"_flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, {_VARLEN}, dropout_p,"
        " softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,"
        " rng_state=None, zero_tensors=False) -> softmax_d",
    ),
}
_CACHES = (
    "k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q,"
    " max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale,"
    " v_descale"
)
_PACKED = "cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k"
FLASH3 = {
    "flash-attn-3 of 2.8.3": (
        f"_flash_attn_forward(q, k, v, {_CACHES}, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0,"
        " softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0)"
        " -> (out, softmax_lse, *rest)",
        f"_flash_attn_backward(dout, q, k, v, out, softmax_lse, {_PACKED}, dq, dk, dv, softmax_scale, causal,"
        " window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0) -> (dq, dk, dv, softmax_d)",
    ),
    "flash-attn-3 of main": (
        f"_flash_attn_forward(q, k, v, {_CACHES.replace('out,', 'out_,').replace(',', '=None,')}=None,"
        " softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0,"
        " rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0)"
        " -> (out, softmax_lse, out_accum, softmax_lse_accum)",
        f"_flash_attn_backward(dout, q, k, v, out, softmax_lse, {_PACKED.replace(',', '=None,')}=None, dq=None,"
        " dk=None, dv=None, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,"
        " softcap=0.0, deterministic=False, sm_margin=0) -> softmax_d",
    ),
}
_PACKED4 = f"{_VARLEN}=None".replace(",", "=None,")
FLASH4 = {
    "flash-attn-4 4.0.0b4": (
        f"_flash_attn_fwd(q, k, v, {_PACKED4}, softmax_scale=None, causal=False, softcap=None,"
        " window_size_left=None, window_size_right=None, score_mod=None, return_lse=False, out=None, lse=None)"
        " -> (out, lse)",
        "_flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,"
        f" window_size_left=None, window_size_right=None, {_PACKED4}, deterministic=False, dq=None, dk=None, dv=None)"
        " -> (dq, dk, dv)",
    ),
    "flash-attn-4 4.0.0b36": (
        f"_flash_attn_fwd(q, k, v, qv=None, {_PACKED4}, softmax_scale=None, causal=False, softcap=None,"
        " window_size_left=None, window_size_right=None, score_mod=None, return_lse=False, out=None, lse=None)"
        " -> (out, lse, p, row_max, o_lo)",
        "_flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,"
        f" window_size_left=None, window_size_right=None, {_PACKED4}, deterministic=False, dq=None, dk=None, dv=None,"
        " dlse=None, learnable_sink=None) -> (dq, dk, dv)",
    ),
}
_TE_SIZES = "max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv"
_TE_PADDED = "cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None"
_TE_OLD = f'{_TE_PADDED}, qkv_layout="sbh3d", attn_bias_type="no_bias", attn_mask_type="padding", window_size=(-1, -1)'
_TE_NEW = (
    f'{_TE_PADDED}, qkv_layout="sbh3d", o_format="sbhd", attn_bias_type="no_bias", attn_mask_type="padding",'
    ' softmax_type="vanilla", window_size=(-1, -1), bottom_right_diagonal=None'
)
TE = {
    "transformer-engine 2.2.0": (
        f"fused_attn_fwd(is_training, {_TE_SIZES}, q, k, v, fake_dtype, fused_attention_backend, attn_bias=None,"
        f" attn_scale=None, dropout=0.0, {_TE_OLD}, rng_gen=None) -> (output_tensors[0], output_tensors[1:])",
        f"fused_attn_bwd({_TE_SIZES}, q, k, v, o, d_o, fake_dtype, dqkv_dtype, aux_ctx_tensors,"
        f" fused_attention_backend, attn_scale=None, dropout=0.0, {_TE_OLD}, deterministic=False) -> output_tensors",
    ),
    "transformer-engine 2.20.2": (
        f"fused_attn_fwd(is_training, {_TE_SIZES}, q, k, v, fake_dtype, fused_attention_backend, attn_bias=None,"
        f" attn_scale=None, dropout=0.0, {_TE_NEW}, rng_gen=None, return_max_logit=False, cuda_graph=False)"
        " -> (output_tensors[0], output_tensors[1:])",
        f"fused_attn_bwd({_TE_SIZES}, q, k, v, o, d_o, fake_dtype, aux_ctx_tensors, fused_attention_backend,"
        f' attn_scale=None, dropout=0.0, {_TE_NEW}, do_format="sbhd", dqkv_layout="sbh3d", deterministic=False,'
        " cuda_graph=False) -> output_tensors",
    ),
}
LIBRARIES = (
    (FLASH2, partial(flash.FlashKernel, flash.FLASH2), fakes.flash2),
    (FLASH3, partial(flash.FlashKernel, flash.FLASH3), fakes.flash3),
    (FLASH4, partial(flash.FlashKernel, flash.FLASH4), fakes.flash4),
    (TE, TransformerEngineKernel, fakes.transformer_engine),
)


def make(title: str) -> PreparedKernel:
    """The adapter of a release, upon its fake.

    Raises:
        UnavailableError: it does not fit.
    """
    for releases, kernel, library in LIBRARIES:
        if title in releases:
            return kernel(library(*(fakes.definition(source) for source in releases[title])), title=title)
    raise KeyError(title)


#: By name: all that fit.
ADAPTERS: dict[str, Callable[[], PreparedKernel]] = {
    title: lambda title=title: make(title)
    for releases, _, _ in LIBRARIES
    for title in releases
    if title != "flash-attn 2.5.9"
} | {
    "torch": lambda: TorchFlashKernel(fakes.Aten()),
    "cudnn": lambda: TorchCudnnKernel(fakes.Aten()),
    "cudnn, wide lse": lambda: TorchCudnnKernel(fakes.Aten(lse_has_width=True)),
}
