"""TransformerEngine's fused attention, which is cuDNN's: sbhd as it is, windows counted from the top left corner."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels.fused import Limits, TileOptions
from megatron_wallfacer.kernels.layouts import lse_bhs, lse_sbh
from megatron_wallfacer.kernels.library import LibraryKernel
from megatron_wallfacer.kernels.optional import TRANSFORMER_ENGINE, UnavailableError
from megatron_wallfacer.kernels.signatures import Neutral
from megatron_wallfacer.kernels.windows import Window, top_left
from megatron_wallfacer.schedule.mask import Band

_BACKEND = "F16_arbitrary_seqlen"
_LAYOUT = "sbhd_sbhd_sbhd"
#: From there on it passes windows to cuDNN that do not end at the diagonal.
_WINDOWS_SINCE = (2, 16)


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
        self._attend.check(dict.fromkeys("qkv") | self._forward_options() | _sizes(None, None))
        tensors = dict.fromkeys(("q", "k", "v", "o", "d_o", "aux_ctx_tensors"))
        self._differentiate.check(tensors | self._backward_options(None) | _sizes(None, None))

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, tile: TileOptions) -> tuple[Tensor, Tensor]:
        tensors = {name: x.contiguous() for name, x in (("q", q), ("k", k), ("v", v))}
        options = self._forward_options() | self._mask(tile, q, k)
        out, aux, *_ = self._attend(tensors | options | _sizes(q, k) | {"attn_scale": tile.scale})
        return out, lse_sbh(aux[0].squeeze(-1))

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: TileOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        names = (("q", q), ("k", k), ("v", v), ("o", out), ("d_o", dout))
        tensors = {name: x.contiguous() for name, x in names}
        # What forward would have left, with the lse of all keys in the place of this tile's.
        tensors["aux_ctx_tensors"] = [lse_bhs(lse).unsqueeze(-1), _random_state(q.device)]
        options = self._backward_options(q.dtype) | self._mask(tile, q, k)
        dq, dk, dv, *_ = self._differentiate(tensors | options | _sizes(q, k) | {"attn_scale": tile.scale})
        return dq, dk, dv

    def _find_backend(self) -> Any:
        try:
            return self._module.FusedAttnBackend[_BACKEND]
        except (AttributeError, KeyError) as error:
            raise UnavailableError(f"{self._title}: there is no backend {_BACKEND}; needs {self.needs}") from error

    def _mask(self, tile: TileOptions, q: Tensor, k: Tensor) -> dict[str, Any]:
        return _mask(tile.causal, tile.band, q.shape[0], k.shape[0], any_window=self._any_window)

    def _options(self) -> dict[str, Any]:
        return {
            "fused_attention_backend": self._backend,
            "dropout": 0.0,
            "attn_scale": 1.0,
            "attn_bias_type": "no_bias",
            "qkv_layout": _LAYOUT,
            # Before 2.15 the layouts of all else follow from that of q, k and v.
            "o_format": Neutral("sbhd"),
        } | _mask(False, None, 1, 1, any_window=False)

    def _forward_options(self) -> dict[str, Any]:
        return self._options() | {"is_training": True}

    def _backward_options(self, dtype: torch.dtype | None) -> dict[str, Any]:
        layouts = {"do_format": Neutral("sbhd"), "dqkv_layout": Neutral(_LAYOUT)}
        if self._differentiate.has("dqkv_dtype"):  # until 2.14; later the gradients are as q
            layouts["dqkv_dtype"] = None if dtype is None else self._dtype_of_theirs(dtype)
        return self._options() | layouts | {"deterministic": self.deterministic}

    def _dtype_of_theirs(self, dtype: torch.dtype) -> Any:
        return next(theirs for theirs, ours in self._module.TORCH_DType.items() if ours == dtype)


def _sizes(q: Tensor | None, k: Tensor | None) -> dict[str, Any]:
    """Lengths of queries and keys, the same in each sequence of the batch. ``fake_dtype`` is that of q."""
    names = ("max_seqlen_q", "max_seqlen_kv", "cu_seqlens_q", "cu_seqlens_kv", "fake_dtype")
    if q is None or k is None:
        return dict.fromkeys(names)
    (rows, batch), cols = q.shape[:2], k.shape[0]
    ends = (_ends(batch, length, q.device) for length in (rows, cols))
    return dict(zip(names, (rows, cols, *ends, q.dtype), strict=True))


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


@lru_cache(maxsize=256)
def _ends(batch: int, length: int, device: torch.device) -> Tensor:
    """Where sequences of a batch begin and end, int32 ``[batch + 1]``: made once, as it is a copy to the device."""
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _random_state(device: torch.device) -> Tensor:
    """Seed and offset of the dropout that there is not: backward only takes their address."""
    return torch.zeros(2, dtype=torch.int64, device=device)
