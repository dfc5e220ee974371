"""The interface of a local attention kernel."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_wallfacer.kernels.capabilities import Capabilities, Inputs
from megatron_wallfacer.schedule.attn_tile import AttnTile


class AttnSpec(NamedTuple):
    """What all tiles of a layer have in common.

    Attributes:
        scale: factor of the scores, before the cap.
        softcap: c > 0 turns scores s into c tanh(s / c); 0 for none.
    """

    scale: float
    softcap: float = 0.0


class Kernel(Protocol):
    """Attention of query rows against key columns on one device.

    Layout: q, out, dout, dq are sbhd ``[rows, batch, q_heads, head_dim]``; k, v, dk, dv are sbhd ``[cols, batch,
    kv_heads, head_dim]`` with kv_heads dividing q_heads, never expanded by the caller; lse is
    ``[rows, batch, q_heads]``, natural logarithm, scale applied, in the accumulation dtype (fp32, or fp64 for fp64).

    Tensors are already cut to ``tile.rows`` and ``tile.cols``. A causal tile is square: rows and cols are the same
    positions. With ``tile.cu_seqlens`` the batch is 1.
    """

    name: str
    capabilities: Capabilities

    def unsupported_reason(self, inputs: Inputs) -> str | None:
        """Return why this kernel does not support such inputs, as a phrase; None if it does."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: AttnTile, spec: AttnSpec) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of this tile alone.

        Raises:
            OptionError: the kernel does not support the tile's window or the cap of logits.
        """
        ...

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return this tile's part of (dq, dk, dv), given the *global* lse of the rows.

        ``out`` enters only through rowsum(dout * out): any tensor with the right row sums gives the same result.

        Raises:
            OptionError: as :meth:`forward`.
        """
        ...


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
