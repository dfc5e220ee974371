"""A kernel that computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_wallfacer.kernels.protocol import AttnSpec, Capabilities, accumulation_dtype
from megatron_wallfacer.schedule.attn_tile import AttnTile


class NoKernel:
    """Returns results of the right shape at once: a pass with it takes the time of everything but kernels."""

    name = "none"
    capabilities = Capabilities()

    def __init__(self) -> None:
        self._results: dict[tuple[object, ...], Tensor] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: AttnTile, spec: AttnSpec) -> tuple[Tensor, Tensor]:
        lse_dtype = accumulation_dtype(q.dtype)
        return self._like("out", (*q.shape[:3], v.shape[-1]), q), self._like("lse", q.shape[:3], q, lse_dtype)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: AttnTile,
        spec: AttnSpec,
    ) -> tuple[Tensor, ...]:
        return tuple(self._like(name, x.shape, x) for name, x in (("dq", q), ("dk", k), ("dv", v)))

    def _like(self, name: str, shape: Sequence[int], x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        key = (name, *shape)
        if key not in self._results:
            self._results[key] = torch.zeros(tuple(shape), dtype=dtype or x.dtype, device=x.device)
        return self._results[key]
