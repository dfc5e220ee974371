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
from megatron_wallfacer.kernels.layouts import lse_bhs, lse_sbh, swapped
from megatron_wallfacer.kernels.library import LibraryKernel
from megatron_wallfacer.kernels.packing import ends, thd, unpacked
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
        self._attend_packed, self._differentiate_packed = self._find(self.packed_functions or self.functions)
        packing = self._packing(None, None)
        for attend, more in ((self._attend, {}), (self._attend_packed, packing)):
            attend.check(dict.fromkeys("qkv") | self._forward_values(attend, Options()) | more)
        tensors = dict.fromkeys(("dout", "q", "k", "v", "out", self.lse_name, "dq", "dk", "dv"))
        for differentiate, more in ((self._differentiate, {}), (self._differentiate_packed, packing)):
            differentiate.check(tensors | self._backward_values(differentiate, Options()) | more)

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, *, lengths: Lengths, causal: bool, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        values = self._forward_values(self._attend_packed, Options(causal, scale, softcap=softcap))
        tensors = {name: thd(x) for name, x in (("q", q), ("k", k), ("v", v))}
        found = self._attend_packed(tensors | values | self._packing(lengths, q.device))
        out, lse_ht = self._out_and_lse(found)
        return unpacked(out), unpacked(lse_ht.t())

    def backward_packed(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        lengths: Lengths,
        causal: bool,
        scale: float,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        named = {"dout": dout, "q": q, "k": k, "v": v, "out": out}
        tensors = {name: thd(x) for name, x in named.items()} | {self.lse_name: thd(lse).t().contiguous()}
        values = self._backward_values(self._differentiate_packed, Options(causal, scale, softcap=softcap))
        grads = {f"d{name}": torch.empty_like(tensors[name]) for name in "qkv"}
        self._differentiate_packed(tensors | grads | values | self._packing(lengths, q.device))
        dq, dk, dv = (unpacked(grad) for grad in grads.values())
        return dq, dk, dv

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, tile: TileOptions) -> tuple[Tensor, Tensor]:
        tensors = {"q": swapped(q), "k": swapped(k), "v": swapped(v)}
        values = self._forward_values(self._attend, _options(tile, q, k))
        out, lse = self._out_and_lse(self._attend(tensors | values))
        return swapped(out), lse_sbh(lse)

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: TileOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        named = {"dout": dout, "q": q, "k": k, "v": v, "out": out}
        tensors = {name: swapped(x) for name, x in named.items()} | {self.lse_name: lse_bhs(lse)}
        dq, dk, dv = (torch.empty_like(tensors[name]) for name in "qkv")
        values = self._backward_values(self._differentiate, _options(tile, q, k))
        self._differentiate(tensors | {"dq": dq, "dk": dk, "dv": dv} | values)
        return swapped(dq), swapped(dk), swapped(dv)

    def _out_and_lse(self, found: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return found[0], found[1]

    def _packing(self, lengths: Lengths | None, device: torch.device | None) -> dict[str, Any]:
        """Where documents begin and end, and how long the longest is; bare parameters without lengths."""
        if lengths is None:
            return dict.fromkeys(PACKING)
        return dict(zip(PACKING, (*(ends(side, device) for side in lengths), *map(max, lengths)), strict=True))

    @abstractmethod
    def _forward_values(self, callee: Callee, options: Options) -> dict[str, Any]: ...

    @abstractmethod
    def _backward_values(self, callee: Callee, options: Options) -> dict[str, Any]: ...
