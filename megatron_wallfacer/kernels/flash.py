"""What FlashAttention 2, 3 and 4 have in common: bshd, any strides, windows from the bottom right corner.

Packed documents are thd, the lse ``[heads, rows]``.
"""

from __future__ import annotations

from abc import abstractmethod
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from megatron_wallfacer.kernels.fused import TileOptions
from megatron_wallfacer.kernels.layouts import Layout, lse_bhs, lse_sbh, swapped
from megatron_wallfacer.kernels.library import LibraryKernel
from megatron_wallfacer.kernels.packing import ends, lse_ht, lse_s1h, thd, unpacked
from megatron_wallfacer.kernels.signatures import Callee
from megatron_wallfacer.kernels.windows import Window, bottom_right
from megatron_wallfacer.schedule.mask import Lengths

#: Parameters for packed documents.
PACKING = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


class Options(NamedTuple):
    """What a call is told beside tensors."""

    causal: bool = False
    scale: float = 1.0
    window: Window = Window()
    softcap: float = 0.0


def _options(tile: TileOptions, q: Tensor, k: Tensor) -> Options:
    return Options(tile.causal, tile.scale, bottom_right(tile.band, q.shape[0], k.shape[0]), tile.softcap)


def _packing(lengths: Lengths | None, device: torch.device) -> dict[str, Any]:
    """Where documents begin and end, and how long the longest is."""
    if lengths is None:
        return {}
    return dict(zip(PACKING, (*(ends(side, device) for side in lengths), *map(max, lengths)), strict=True))


class _Way(NamedTuple):
    """How one tile, or several documents, are called."""

    layout: Layout
    attend: Callee
    differentiate: Callee


_BSHD = Layout(swapped, swapped, lse_bhs, lse_sbh)
_THD = Layout(thd, unpacked, lse_ht, lse_s1h)


class FlashKernel(LibraryKernel):
    """Calls the functions with tensors; what else they are given, and how it is called, a subclass says.

    All releases write gradients where they are told to. Some return them too, some do not.
    """

    #: The parameter of backward for the log-sum-exp.
    lse_name: ClassVar[str] = "softmax_lse"
    #: The functions for packed documents, where they are others.
    packed_functions: ClassVar[tuple[str, str] | None] = None
    packs = True

    def __init__(
        self, module: ModuleType | None = None, *, title: str | None = None, deterministic: bool | None = None
    ) -> None:
        super().__init__(module, title=title, deterministic=deterministic)
        self._single = _Way(_BSHD, self._attend, self._differentiate)
        self._packed = _Way(_THD, *self._find(self.packed_functions or self.functions))
        tensors = dict.fromkeys(("dout", "q", "k", "v", "out", self.lse_name, "dq", "dk", "dv"))
        for way, packing in ((self._single, {}), (self._packed, dict.fromkeys(PACKING))):
            way.attend.check(dict.fromkeys("qkv") | self._forward_values(way.attend, Options()) | packing)
            way.differentiate.check(tensors | self._backward_values(way.differentiate, Options()) | packing)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, tile: TileOptions) -> tuple[Tensor, Tensor]:
        layout, attend, _ = self._way(tile)
        tensors = {name: layout.theirs(x) for name, x in (("q", q), ("k", k), ("v", v))}
        values = self._forward_values(attend, _options(tile, q, k)) | _packing(tile.lengths, q.device)
        out, lse = self._out_and_lse(attend(tensors | values))
        return layout.ours(out), layout.lse_ours(lse)

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: TileOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout, _, differentiate = self._way(tile)
        named = {"dout": dout, "q": q, "k": k, "v": v, "out": out}
        tensors = {name: layout.theirs(x) for name, x in named.items()} | {self.lse_name: layout.lse_theirs(lse)}
        grads = {f"d{name}": torch.empty_like(tensors[name]) for name in "qkv"}
        values = self._backward_values(differentiate, _options(tile, q, k)) | _packing(tile.lengths, q.device)
        differentiate(tensors | grads | values)
        dq, dk, dv = (layout.ours(grad) for grad in grads.values())
        return dq, dk, dv

    def _way(self, tile: TileOptions) -> _Way:
        return self._single if tile.lengths is None else self._packed

    def _out_and_lse(self, found: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return found[0], found[1]

    @abstractmethod
    def _forward_values(self, callee: Callee, options: Options) -> dict[str, Any]: ...

    @abstractmethod
    def _backward_values(self, callee: Callee, options: Options) -> dict[str, Any]: ...
