"""What FlashAttention 2, 3 and 4 have in common: bshd, any strides, windows from the bottom right corner."""

from __future__ import annotations

from abc import abstractmethod
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from megatron_wallfacer.kernels.fused import TileOptions
from megatron_wallfacer.kernels.layouts import lse_bhs, lse_sbh, swapped
from megatron_wallfacer.kernels.library import LibraryKernel
from megatron_wallfacer.kernels.windows import Window, bottom_right


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

    def __init__(
        self, module: ModuleType | None = None, *, title: str | None = None, deterministic: bool | None = None
    ) -> None:
        super().__init__(module, title=title, deterministic=deterministic)
        self._attend.check(dict.fromkeys("qkv") | self._forward_values(Options()))
        tensors = dict.fromkeys(("dout", "q", "k", "v", "out", self.lse_name, "dq", "dk", "dv"))
        self._differentiate.check(tensors | self._backward_values(Options()))

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, tile: TileOptions) -> tuple[Tensor, Tensor]:
        options = _options(tile, q, k)
        tensors = {"q": swapped(q), "k": swapped(k), "v": swapped(v)}
        out, lse = self._out_and_lse(self._attend(tensors | self._forward_values(options)))
        return swapped(out), lse_sbh(lse)

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: TileOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = _options(tile, q, k)
        named = {"dout": dout, "q": q, "k": k, "v": v, "out": out}
        tensors = {name: swapped(x) for name, x in named.items()} | {self.lse_name: lse_bhs(lse)}
        dq, dk, dv = (torch.empty_like(tensors[name]) for name in "qkv")
        self._differentiate(tensors | {"dq": dq, "dk": dk, "dv": dv} | self._backward_values(options))
        return swapped(dq), swapped(dk), swapped(dv)

    def _out_and_lse(self, found: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return found[0], found[1]

    @abstractmethod
    def _forward_values(self, options: Options) -> dict[str, Any]: ...

    @abstractmethod
    def _backward_values(self, options: Options) -> dict[str, Any]: ...
