"""Every direct call of a local kernel in these measurements, and a kernel that computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.kernels.protocol import Kernel, accumulation_dtype
from megatron_wallfacer.schedule.mask import Band, Lengths


def tile_forward(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    band: Band | None = None,
    lengths: Lengths | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of one tile, shapes and masks as in the kernel protocol."""
    return kernel.forward(q, k, v, causal=causal, scale=scale, **_given(band, lengths))


def tile_backward(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
    band: Band | None = None,
    lengths: Lengths | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of one tile."""
    return kernel.backward(dout, q, k, v, out, lse, causal=causal, scale=scale, **_given(band, lengths))


def _given(band: Band | None, lengths: Lengths | None) -> dict[str, Any]:
    """Masks that a kernel need not know unless they are there."""
    return {name: mask for name, mask in (("band", band), ("lengths", lengths)) if mask is not None}


class NoKernel:
    """Returns results of the right shape at once: a pass with it takes the time of everything but kernels."""

    name = "none"

    def __init__(self) -> None:
        self._results: dict[tuple[object, ...], Tensor] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        lse_dtype = accumulation_dtype(q.dtype)
        return self._like("out", (*q.shape[:3], v.shape[-1]), q), self._like("lse", q.shape[:3], q, lse_dtype)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor, **__: Any) -> tuple[Tensor, ...]:
        return tuple(self._like(name, x.shape, x) for name, x in (("dq", q), ("dk", k), ("dv", v)))

    def _like(self, name: str, shape: Sequence[int], x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        key = (name, *shape)
        if key not in self._results:
            self._results[key] = torch.zeros(tuple(shape), dtype=dtype or x.dtype, device=x.device)
        return self._results[key]
