"""TransformerEngine's fused attention, which calls cuDNN.

TransformerEngine's tensors are sbhd, and its windows are counted from the top-left corner. Tensors of packed documents
are thd, with softmax statistics ``[rows, heads, 1]``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, cuda

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels.optional import TRANSFORMER_ENGINE, UnavailableError
from megatron_wallfacer.kernels.prepared import BackwardCall, ForwardCall, PreparedKernel, TensorKind
from megatron_wallfacer.kernels.protocol import FUSED, AttnSpec, Gradients, capability
from megatron_wallfacer.kernels.signatures import LoadedLibrary, OptionalArgument
from megatron_wallfacer.kernels.windows import WindowSize, cu_seqlens_tensor, top_left
from megatron_wallfacer.schedule.attn_tile import AttnTile, CuSeqlens

_NEEDS = "transformer-engine >= 2.1"
_BACKEND = "F16_arbitrary_seqlen"
#: First release of TransformerEngine that passes windows to cuDNN whose right end is not the diagonal.
_WINDOWS_SINCE = (2, 16)
#: First cuDNN version that packs the statistics of documents. Earlier versions pad documents to the longest one.
_VARLEN_SINCE = 90600


class TransformerEngineKernel(PreparedKernel):
    """``fused_attn_fwd`` and ``fused_attn_bwd`` of TransformerEngine.

    TransformerEngine checks in each call that head dims, GPU and cuDNN version fit together. TransformerEngine ignores
    strides, so all tensors are made contiguous.

    For ``module`` and ``title`` see :class:`LoadedLibrary`, for ``deterministic`` see :class:`PreparedKernel`.
    A library that is not installed or not supported raises :class:`UnavailableError`.
    """

    name = "te"
    capabilities = replace(FUSED, v_head_dim=True, window=True, varlen=True)

    def __init__(
        self, module: ModuleType | None = None, *, title: str | None = None, deterministic: bool | None = None
    ) -> None:
        super().__init__(deterministic=deterministic)
        self._library = LoadedLibrary(TRANSFORMER_ENGINE, _NEEDS, module, title)
        window = _release(self._library.title) >= _WINDOWS_SINCE
        self.capabilities = replace(self.capabilities, window=window, varlen=self._has_varlen())
        self._backend = self._find_backend()
        self._attend = self._library.function("fused_attn_fwd", "qkv")
        self._differentiate = self._library.function("fused_attn_bwd", ("q", "k", "v", "o", "d_o", "aux_ctx_tensors"))
        spec, tensors = AttnSpec(1.0), TensorKind(1, None, torch.device("cpu"))
        for documents in (None, CuSeqlens((0, 1), (0, 1))):
            tile = AttnTile((0, 1), (0, 1), cu_seqlens=documents)
            self._attend.bind(self._forward_arguments(tile, spec, tensors))
            self._differentiate.bind(self._backward_arguments(tile, spec, tensors))

    def prepare_forward(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> ForwardCall:
        """See :meth:`PreparedKernel.prepare_forward`."""
        call = self._attend.bind(self._forward_arguments(tile, spec, tensors))
        has_cuda_graph = self._attend.has("cuda_graph")
        return _forward(call, self._library.title, varlen=tile.cu_seqlens is not None, has_cuda_graph=has_cuda_graph)

    def prepare_backward(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> BackwardCall:
        """See :meth:`PreparedKernel.prepare_backward`."""
        call = self._differentiate.bind(self._backward_arguments(tile, spec, tensors))
        has_cuda_graph = self._differentiate.has("cuda_graph")
        state = _random_state(tensors.device)
        return _backward(call, state, varlen=tile.cu_seqlens is not None, has_cuda_graph=has_cuda_graph)

    def _find_backend(self) -> Any:
        try:
            return self._library.module.FusedAttnBackend[_BACKEND]
        except (AttributeError, KeyError) as error:
            raise UnavailableError(f"{self._library.title}: there is no backend {_BACKEND}; needs {_NEEDS}") from error

    def _has_varlen(self) -> bool:
        """Return whether cuDNN supports packed documents (thd) on this GPU, and returns an lse without padding."""
        gpu, cudnn = capability(torch.device("cuda")), getattr(self._library.module, "tex", None)
        version = getattr(cudnn, "get_cudnn_version", lambda: 0)()
        return gpu is not None and gpu >= (9, 0) and gpu != (12, 0) and version >= _VARLEN_SINCE

    def _arguments(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> dict[str, Any]:
        """Return the library arguments that forward and backward have in common."""
        layout, three = _layouts(tile)
        return {
            "fused_attention_backend": self._backend,
            "dropout": 0.0,
            "attn_scale": spec.scale,
            "attn_bias_type": "no_bias",
            "qkv_layout": three,
            # Before 2.15 all layouts follow from the layout of q, k and v.
            "o_format": OptionalArgument(layout),
            "bottom_right_diagonal": OptionalArgument(False),
            "fake_dtype": tensors.dtype,
        } | (self._plain_arguments(tile, tensors) if tile.cu_seqlens is None else _varlen_arguments(tile, tensors))

    def _forward_arguments(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> dict[str, Any]:
        return self._arguments(tile, spec, tensors) | {"is_training": True}

    def _backward_arguments(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> dict[str, Any]:
        layout, three = _layouts(tile)
        layouts = {"do_format": OptionalArgument(layout), "dqkv_layout": OptionalArgument(three)}
        if self._differentiate.has("dqkv_dtype"):  # until 2.14; since then gradients have the dtype of q
            dtypes = {of_torch: library for library, of_torch in self._library.module.TORCH_DType.items()}
            layouts["dqkv_dtype"] = dtypes.get(tensors.dtype)  # None if only parameter names are checked
        return self._arguments(tile, spec, tensors) | layouts | {"deterministic": self.deterministic}

    def _plain_arguments(self, tile: AttnTile, tensors: TensorKind) -> dict[str, Any]:
        """Return the size and mask arguments of a tile without packed documents. All sequences have the same length."""
        window = WindowSize(None, 0) if tile.causal else top_left(tile)
        # A window that ends at the diagonal is a causal mask with a limit, which all releases support.
        kind = "causal" if window.right == 0 else "no_mask"
        if kind == "no_mask" and window != WindowSize() and not self.capabilities.window:
            # TransformerEngine's own error names no alternative.
            raise OptionError(
                "kernel", "te", f"flash or torch here, because te before 2.16 does not support the window {tile.window}"
            )
        starts = (range(0, size * tensors.batch + 1, size) for size in (tile.height, tile.width))
        return {
            "max_seqlen_q": tile.height,
            "max_seqlen_kv": tile.width,
            **_boundaries(*map(tuple, starts), tensors.device),
            "attn_mask_type": kind,
            "window_size": window.numbers,
        }


def _varlen_arguments(tile: AttnTile, tensors: TensorKind) -> dict[str, Any]:
    """Return the arguments for packed documents. Without padding the plain and the padded boundaries are equal."""
    documents = tile.cu_seqlens
    starts = _boundaries(documents.q, documents.k, tensors.device)
    return {
        "max_seqlen_q": documents.longest[0],
        "max_seqlen_kv": documents.longest[1],
        **starts,
        **{f"{name}_padded": boundaries for name, boundaries in starts.items()},
        "attn_mask_type": "padding_causal" if tile.causal else "padding",
        "window_size": (-1, 0 if tile.causal else -1),
    }


def _boundaries(q: tuple[int, ...], k: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    return {"cu_seqlens_q": cu_seqlens_tensor(q, device), "cu_seqlens_kv": cu_seqlens_tensor(k, device)}


def _layouts(tile: AttnTile) -> tuple[str, str]:
    """Return the layout of one tensor, and TransformerEngine's name of the layout of q, k and v."""
    layout = "sbhd" if tile.cu_seqlens is None else "thd"
    return layout, "_".join([layout] * 3)


# From 2.10 on TransformerEngine receives whether a CUDA graph is captured, and stops a capture that the cuDNN version
# does not support. Forward and backward read it without a helper, because each Python call of a warm call counts.
def _forward(call: Callable[..., Any], title: str, *, varlen: bool, has_cuda_graph: bool) -> ForwardCall:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if varlen:
            q, k, v = q.squeeze(1), k.squeeze(1), v.squeeze(1)
        graph = {"cuda_graph": cuda.is_initialized() and cuda.is_current_stream_capturing()} if has_cuda_graph else {}
        out, (stats, *_), *_ = call(q=q.contiguous(), k=k.contiguous(), v=v.contiguous(), **graph)
        if not varlen:
            return out, stats.squeeze(-1).permute(2, 0, 1)
        if stats.dim() != 3:
            shape = tuple(stats.shape)
            raise UnavailableError(f"{title}: packed documents need softmax statistics of 3 dimensions, not {shape}")
        return out.unsqueeze(1), stats.squeeze(-1).unsqueeze(1)

    return forward


def _backward(call: Callable[..., Any], random_state: Tensor, *, varlen: bool, has_cuda_graph: bool) -> BackwardCall:
    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        tensors = {"q": q, "k": k, "v": v, "o": out, "d_o": dout}
        tensors = {name: (x.squeeze(1) if varlen else x).contiguous() for name, x in tensors.items()}
        # TransformerEngine's auxiliary tensors of forward, except that the lse covers all keys.
        stats = lse.squeeze(1) if varlen else lse.permute(1, 2, 0)
        aux = [stats.unsqueeze(-1).contiguous(), random_state]
        graph = {"cuda_graph": cuda.is_initialized() and cuda.is_current_stream_capturing()} if has_cuda_graph else {}
        dq, dk, dv, *_ = call(**tensors, aux_ctx_tensors=aux, **graph)
        return (dq.unsqueeze(1), dk.unsqueeze(1), dv.unsqueeze(1)) if varlen else (dq, dk, dv)

    return backward


def _release(title: str) -> tuple[int, ...]:
    """Return (2, 16) for ``transformer-engine 2.16.1``; an empty tuple for text without a version."""
    found = re.search(r" (\d+)\.(\d+)", title)
    return tuple(int(number) for number in found.groups()) if found else ()


@lru_cache(maxsize=64)
def _random_state(device: torch.device) -> Tensor:
    """Return seed and offset of dropout as a tensor. Backward has this argument even without dropout."""
    return torch.zeros(2, dtype=torch.int64, device=device)
