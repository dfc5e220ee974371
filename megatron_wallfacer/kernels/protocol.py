"""What a local attention kernel must offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_wallfacer.schedule.mask import Band, Lengths


@dataclass(frozen=True)
class Inputs:
    """What a kernel will be given, as far as it is known before the first call.

    Attributes:
        device: of the tensors.
        dtype: of q, k and v.
        head_dim: channels of a head's queries and keys.
        v_head_dim: channels of its values.
        softcap: cap of the logits; 0 for none.
        banded: some tiles come with a band, as those of a sliding window do.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    softcap: float = 0.0
    banded: bool = False


class Kernel(Protocol):
    """Attention of query rows against key columns on one device.

    Layout: q, out, dout, dq are sbhd ``[rows, batch, q_heads, head_dim]``; k, v, dk, dv are sbhd ``[cols, batch,
    kv_heads, head_dim]`` with kv_heads dividing q_heads, never expanded by the caller; lse is
    ``[rows, batch, q_heads]``, natural logarithm, scale applied, in the accumulation dtype (fp32, or fp64 for fp64).
    A causal tile is square: rows and cols are the same positions. A ``band`` stands in place of ``causal`` and says
    which diagonals are live; each row and each column has a live pair. ``softcap`` c > 0 makes c tanh(s / c) of scores.

    With ``lengths`` the tile is several documents, whose rows follow one another in q and whose columns in k and v
    without a gap; the batch is 1 and there is no band. A document's rows see its columns: all of them, or where
    ``causal`` as many, down to the diagonal. Only a kernel of which :func:`packs` is true is given any.
    """

    name: str

    def refusal(self, inputs: Inputs) -> str | None:
        """Why this kernel cannot serve such inputs, as a phrase; None if it can."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        scale: float,
        band: Band | None = None,
        softcap: float = 0.0,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of this tile alone: (out, lse)."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
        band: Band | None = None,
        softcap: float = 0.0,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This tile's part of (dq, dk, dv), given the *global* lse of the rows.

        ``out`` enters only through rowsum(dout * out), so any tensor with the right row sums will do.
        """
        ...


def packs(kernel: Kernel) -> bool:
    """Whether a kernel takes several documents in one call: its ``packs``; one that does not say so does not."""
    return getattr(kernel, "packs", False)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
