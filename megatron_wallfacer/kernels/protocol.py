"""What a local attention kernel must offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeGuard

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This tile's part of (dq, dk, dv), given the *global* lse of the rows.

        ``out`` enters only through rowsum(dout * out), so any tensor with the right row sums will do.
        """
        ...


class PackingKernel(Kernel, Protocol):
    """A kernel that can take several documents in one call, where ``packs`` says so.

    Their rows follow one another in q, their columns in k and v, without a gap; the batch is 1. Rows of a document see
    the columns of that document: all of them, or where ``causal`` as many, down to the diagonal. All else is as in
    :class:`Kernel`: one lse, global in backward, and any output with the right row sums.
    """

    packs: bool

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, *, lengths: Lengths, causal: bool, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Attention of these documents: (out, lse)."""
        ...

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
        """These documents' part of (dq, dk, dv)."""
        ...


def packs(kernel: Kernel) -> TypeGuard[PackingKernel]:
    """Whether a kernel takes several documents in one call; one that does not say so does not."""
    return getattr(kernel, "packs", False)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
