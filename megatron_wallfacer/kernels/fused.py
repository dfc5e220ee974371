"""What the fused kernels for GPUs have in common: limits, tall bands, and whether they repeat bit by bit."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from megatron_wallfacer.kernels.protocol import Inputs
from megatron_wallfacer.kernels.windows import strips
from megatron_wallfacer.schedule.mask import Band, Lengths

_HALF = (torch.float16, torch.bfloat16)
#: Head dims are read in vectors of 16 bytes.
_MULTIPLE = 8


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a GPU; None where there is none to ask."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def deterministic_asked_for() -> bool:
    """Whether PyTorch or TransformerEngine's variable (which Megatron's ``--deterministic-mode`` wants) asks for it."""
    return (
        torch.are_deterministic_algorithms_enabled() or os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") == "0"
    )


@dataclass(frozen=True)
class Limits:
    """What a kernel serves.

    Attributes:
        generations: major compute capabilities, e.g. 9 for Hopper; None for 8 and all after it.
        max_head_dim: the widest.
        softcap: it caps logits.
        bands: it masks any band of diagonals.
        v_head_dim: that of the values may be another one.
    """

    generations: tuple[int, ...] | None = None
    max_head_dim: int = 256
    softcap: bool = False
    v_head_dim: bool = False
    bands: bool = True

    def refusal(self, inputs: Inputs) -> str | None:
        """See :meth:`Kernel.refusal`."""
        if inputs.device.type != "cuda":
            return f"it runs on a CUDA device, the tensors are on {inputs.device.type}"
        if inputs.dtype not in _HALF:
            return f"it computes in fp16 and bf16, the tensors are {str(inputs.dtype).removeprefix('torch.')}"
        if inputs.softcap and not self.softcap:
            return f"it does not cap logits, softcap is {inputs.softcap}"
        if inputs.banded and not self.bands:
            return "it does not mask every band of diagonals, and a sliding window makes such of its tiles"
        return self._size_refusal(inputs.head_dim, inputs.v_head_dim) or self._generation_refusal(inputs.device)

    def _size_refusal(self, head_dim: int, v_head_dim: int) -> str | None:
        if max(head_dim, v_head_dim) > self.max_head_dim:
            return f"its head dims go up to {self.max_head_dim}, here it is {max(head_dim, v_head_dim)}"
        odd = next((dim for dim in (head_dim, v_head_dim) if dim % _MULTIPLE), None)
        if odd is not None:
            return f"its head dims are multiples of {_MULTIPLE}, here it is {odd}"
        if head_dim != v_head_dim and not self.v_head_dim:
            return f"its head dims are equal, here they are {head_dim} and {v_head_dim}"
        return None

    def _generation_refusal(self, device: torch.device) -> str | None:
        found = capability(device)
        if found is None:
            return "there is no GPU here"
        if found[0] < 8 or (self.generations is not None and found[0] not in self.generations):
            wanted = "8.0 and later" if self.generations is None else " or ".join(f"{g}.x" for g in self.generations)
            return f"it runs on GPUs of compute capability {wanted}, this one is {found[0]}.{found[1]}"
        return None


class TileOptions(NamedTuple):
    """What a call is told beside tensors; see :class:`megatron_wallfacer.kernels.protocol.Kernel`."""

    causal: bool = False
    scale: float = 1.0
    band: Band | None = None
    softcap: float = 0.0
    lengths: Lengths | None = None


class FusedKernel(ABC):
    """A kernel of a library; see :class:`Kernel`. Adapters serve tiles with bands only where they are not tall.

    Args:
        deterministic: gradients repeat bit by bit; None for what PyTorch or TransformerEngine's variable asks for.
    """

    name: ClassVar[str]
    limits: ClassVar[Limits]
    #: See :func:`megatron_wallfacer.kernels.protocol.packs`.
    packs: bool = False

    def __init__(self, *, deterministic: bool | None = None) -> None:
        self.deterministic = deterministic_asked_for() if deterministic is None else deterministic

    def refusal(self, inputs: Inputs) -> str | None:
        return self.limits.refusal(inputs)

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
        tile = TileOptions(causal, scale, band, softcap, lengths)
        if band is None or q.shape[0] <= k.shape[0]:
            return self._forward(q, k, v, tile)
        parts = [
            self._forward(q[rows], k[cols], v[cols], tile._replace(causal=False, band=part))
            for rows, cols, part in strips(band, q.shape[0], k.shape[0])
        ]
        out, lse = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        return out, lse

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
        tile = TileOptions(causal, scale, band, softcap, lengths)
        if band is None or q.shape[0] <= k.shape[0]:
            return self._backward(dout, q, k, v, out, lse, tile)
        dq, (dk, dv) = torch.empty_like(q), (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
        for rows, cols, part in strips(band, q.shape[0], k.shape[0]):
            tensors = (dout[rows], q[rows], k[cols], v[cols], out[rows], lse[rows])
            dq[rows], dk_part, dv_part = self._backward(*tensors, tile._replace(causal=False, band=part))
            dk[cols] += dk_part
            dv[cols] += dv_part
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    @abstractmethod
    def _forward(self, q: Tensor, k: Tensor, v: Tensor, tile: TileOptions) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: TileOptions
    ) -> tuple[Tensor, Tensor, Tensor]: ...
