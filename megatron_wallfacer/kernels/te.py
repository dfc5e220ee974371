"""TransformerEngine's fused attention, which is cuDNN's: sbhd as it is, windows counted from the top left corner.

Packed documents are thd, the statistics ``[rows, heads, 1]``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels.fused import Limits, TileOptions, capability
from megatron_wallfacer.kernels.layouts import Layout, lse_bhs, lse_sbh
from megatron_wallfacer.kernels.library import LibraryKernel
from megatron_wallfacer.kernels.optional import TRANSFORMER_ENGINE, UnavailableError
from megatron_wallfacer.kernels.packing import ends, thd, unpacked
from megatron_wallfacer.kernels.signatures import Neutral
from megatron_wallfacer.kernels.windows import Window, top_left
from megatron_wallfacer.schedule.mask import Band, Lengths

_BACKEND = "F16_arbitrary_seqlen"
#: From there on it passes windows to cuDNN that do not end at the diagonal.
_WINDOWS_SINCE = (2, 16)
#: cuDNN from which on its statistics of packed documents are packed, too; before, each is padded to the longest.
_PACKED_SINCE = 90600
_SIZES = ("max_seqlen_q", "max_seqlen_kv", "cu_seqlens_q", "cu_seqlens_kv", "fake_dtype")
_SBHD = Layout(Tensor.contiguous, lambda x: x, lse_bhs, lse_sbh)
_THD = Layout(lambda x: thd(x).contiguous(), unpacked, lambda lse: thd(lse).contiguous(), unpacked)
_PACKED_SIZES = ("cu_seqlens_q_padded", "cu_seqlens_kv_padded")


class TransformerEngineKernel(LibraryKernel):
    """``fused_attn_fwd`` and ``fused_attn_bwd`` of TransformerEngine; see :class:`LibraryKernel`.

    Which head dims, GPUs and versions of cuDNN go together the library decides at the call; what it does not serve it
    refuses itself. It reads memory without looking at strides, so all that it gets is contiguous.
    """

    name = "te"
    limits = Limits(v_head_dim=True)
    library = TRANSFORMER_ENGINE
    functions = ("fused_attn_fwd", "fused_attn_bwd")
    needs = "transformer-engine >= 2.1"

    def __init__(
        self, module: ModuleType | None = None, *, title: str | None = None, deterministic: bool | None = None
    ) -> None:
        super().__init__(module, title=title, deterministic=deterministic)
        self._any_window = _release(self._title) >= _WINDOWS_SINCE
        self.limits = replace(self.limits, bands=self._any_window)
        self._backend = self._find_backend()
        self.packs = self._packs()
        sizes = dict.fromkeys((*_SIZES, *_PACKED_SIZES))
        self._attend.check(dict.fromkeys("qkv") | self._forward_options("sbhd") | sizes)
        tensors = dict.fromkeys(("q", "k", "v", "o", "d_o", "aux_ctx_tensors"))
        self._differentiate.check(tensors | self._backward_options("sbhd", None) | sizes)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, tile: TileOptions) -> tuple[Tensor, Tensor]:
        name, layout = _layout(tile)
        tensors = {key: layout.theirs(x) for key, x in (("q", q), ("k", k), ("v", v))}
        out, (stats, *_), *_ = self._attend(tensors | self._forward_options(name) | self._tile(tile, q, k))
        if tile.lengths is not None and stats.dim() != 3:
            raise UnavailableError(
                f"{self._title}: statistics of packed documents are {tuple(stats.shape)}, not packed"
            )
        return layout.ours(out), layout.lse_ours(stats.squeeze(-1))

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: TileOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        name, layout = _layout(tile)
        named = (("q", q), ("k", k), ("v", v), ("o", out), ("d_o", dout))
        tensors = {key: layout.theirs(x) for key, x in named}
        # What forward would have left, with the lse of all keys in the place of this tile's.
        tensors["aux_ctx_tensors"] = [layout.lse_theirs(lse).unsqueeze(-1), _random_state(q.device)]
        options = self._backward_options(name, q.dtype) | self._tile(tile, q, k)
        dq, dk, dv, *_ = self._differentiate(tensors | options)
        return layout.ours(dq), layout.ours(dk), layout.ours(dv)

    def _find_backend(self) -> Any:
        try:
            return self._module.FusedAttnBackend[_BACKEND]
        except (AttributeError, KeyError) as error:
            raise UnavailableError(f"{self._title}: there is no backend {_BACKEND}; needs {self.needs}") from error

    def _packs(self) -> bool:
        """Where cuDNN takes packed documents and gives packed statistics; elsewhere they are called one by one."""
        gpu, cudnn = capability(torch.device("cuda")), getattr(self._module, "tex", None)
        version = getattr(cudnn, "get_cudnn_version", lambda: 0)()
        return gpu is not None and gpu >= (9, 0) and gpu != (12, 0) and version >= _PACKED_SINCE

    def _tile(self, tile: TileOptions, q: Tensor, k: Tensor) -> dict[str, Any]:
        """Scale, sizes and mask."""
        scale = {"attn_scale": tile.scale}
        if tile.lengths is not None:
            return scale | _packed(tile.lengths, tile.causal, q)
        mask = _mask(tile.causal, tile.band, q.shape[0], k.shape[0], any_window=self._any_window)
        return scale | _sizes(q, k) | mask

    def _options(self, layout: str) -> dict[str, Any]:
        return {
            "fused_attention_backend": self._backend,
            "dropout": 0.0,
            "attn_scale": 1.0,
            "attn_bias_type": "no_bias",
            "qkv_layout": _three(layout),
            # Before 2.15 the layouts of all else follow from that of q, k and v.
            "o_format": Neutral(layout),
        } | _mask(False, None, 1, 1, any_window=False)

    def _forward_options(self, layout: str) -> dict[str, Any]:
        return self._options(layout) | {"is_training": True}

    def _backward_options(self, layout: str, dtype: torch.dtype | None) -> dict[str, Any]:
        layouts = {"do_format": Neutral(layout), "dqkv_layout": Neutral(_three(layout))}
        if self._differentiate.has("dqkv_dtype"):  # until 2.14; later the gradients are as q
            layouts["dqkv_dtype"] = None if dtype is None else self._dtype_of_theirs(dtype)
        return self._options(layout) | layouts | {"deterministic": self.deterministic}

    def _dtype_of_theirs(self, dtype: torch.dtype) -> Any:
        return next(theirs for theirs, ours in self._module.TORCH_DType.items() if ours == dtype)


def _layout(tile: TileOptions) -> tuple[str, Layout]:
    """Its name and what it is; all is contiguous."""
    return ("sbhd", _SBHD) if tile.lengths is None else ("thd", _THD)


def _three(layout: str) -> str:
    """The layout of q, k and v, each on its own."""
    return "_".join([layout] * 3)


def _sizes(q: Tensor, k: Tensor) -> dict[str, Any]:
    """Lengths of queries and keys, the same in each sequence of the batch. ``fake_dtype`` is that of q."""
    (rows, batch), cols = q.shape[:2], k.shape[0]
    starts = (ends((length,) * batch, q.device) for length in (rows, cols))
    return dict(zip(_SIZES, (rows, cols, *starts, q.dtype), strict=True))


def _packed(lengths: Lengths, causal: bool, q: Tensor) -> dict[str, Any]:
    """Lengths of documents and their mask. Padded are ends where there is padding between: here they are the same."""
    starts = [ends(side, q.device) for side in lengths]
    sizes = dict(zip(_SIZES, (*map(max, lengths), *starts, q.dtype), strict=True))
    mask = {"attn_mask_type": "padding_causal" if causal else "padding", "window_size": (-1, 0 if causal else -1)}
    return sizes | dict(zip(_PACKED_SIZES, starts, strict=True)) | mask


def _mask(causal: bool, band: Band | None, rows: int, cols: int, *, any_window: bool) -> dict[str, Any]:
    """Mask type and window.

    Raises:
        OptionError: a band that the release does not know: its own message would not say what to do.
    """
    window = Window(None, 0) if causal else top_left(band, rows, cols)
    # A window that ends at the diagonal is a causal mask, which may begin later: known to all releases.
    kind = "causal" if window.right == 0 else "no_mask"
    if kind == "no_mask" and window != Window() and not any_window:
        raise OptionError("kernel", "te", f"flash or torch here, because te before 2.16 has no window for {band}")
    return {"attn_mask_type": kind, "window_size": window.numbers, "bottom_right_diagonal": Neutral(False)}


def _release(title: str) -> tuple[int, ...]:
    """(2, 16) of ``transformer-engine 2.16.1``; empty where the title has no version."""
    found = re.search(r" (\d+)\.(\d+)", title)
    return tuple(int(number) for number in found.groups()) if found else ()


@lru_cache(maxsize=64)
def _random_state(device: torch.device) -> Tensor:
    """Seed and offset of the dropout that there is not: backward only takes their address."""
    return torch.zeros(2, dtype=torch.int64, device=device)
