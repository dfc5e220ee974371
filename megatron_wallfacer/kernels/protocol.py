"""The interface and the declared capabilities of attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_wallfacer.schedule.attn_tile import AttnTile

#: (dq, dk, dv) of a tile.
Gradients = tuple[Tensor, Tensor, Tensor]
HALF = (torch.float16, torch.bfloat16)
_DEVICES = {"cuda": "a CUDA device", "cpu": "a CPU"}


@dataclass(frozen=True)
class Inputs:
    """The properties of tensors and masks by which a kernel is selected.

    Attributes:
        device: device of the tensors.
        dtype: dtype of q, k and v.
        head_dim: channels per query or key head.
        v_head_dim: channels per value head.
        softcap: cap of the logits; 0 for no cap.
        window: whether some tiles have a :class:`TileWindow`, as with a sliding window.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    softcap: float = 0.0
    window: bool = False


@dataclass(frozen=True)
class Capabilities:
    """The inputs that a kernel supports.

    Attributes:
        devices: supported device types; None for all.
        dtypes: supported dtypes of q, k and v; None for all.
        compute_capabilities: supported major compute capabilities, such as 9 for Hopper; None for all from 8 on.
        max_head_dim: largest number of channels per head; None for no limit.
        head_dim_multiple: number that must divide the channels per head.
        v_head_dim: whether value heads may have another number of channels than query and key heads.
        softcap: whether logits can be capped.
        window: whether sliding windows are supported. All kernels support causal tiles.
        varlen: whether one library call computes all documents of ``cu_seqlens``. If not, each document has a call.
    """

    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    compute_capabilities: tuple[int, ...] | None = None
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    v_head_dim: bool = False
    softcap: bool = False
    window: bool = False
    varlen: bool = False

    def unsupported_reason(self, inputs: Inputs) -> str | None:
        """Return the reason why the kernel does not support the inputs, as a phrase, or None if it supports them."""
        if self.devices is not None and inputs.device.type not in self.devices:
            return f"it runs on {_DEVICES[self.devices[0]]}, the tensors are on {inputs.device.type}"
        if self.dtypes is not None and inputs.dtype not in self.dtypes:
            return f"it computes in fp16 and bf16, the tensors are {str(inputs.dtype).removeprefix('torch.')}"
        if inputs.softcap and not self.softcap:
            return f"it does not cap logits, softcap is {inputs.softcap}"
        if inputs.window and not self.window:
            return "its windows end at the diagonal, and a sliding window needs others"
        return self._head_dim_reason(inputs.head_dim, inputs.v_head_dim) or self._gpu_reason(inputs.device)

    def _head_dim_reason(self, head_dim: int, v_head_dim: int) -> str | None:
        largest = max(head_dim, v_head_dim)
        if self.max_head_dim is not None and largest > self.max_head_dim:
            return f"its head dims go up to {self.max_head_dim}, here it is {largest}"
        odd = next((dim for dim in (head_dim, v_head_dim) if dim % self.head_dim_multiple), None)
        if odd is not None:
            return f"its head dims are multiples of {self.head_dim_multiple}, here it is {odd}"
        if head_dim != v_head_dim and not self.v_head_dim:
            return f"its head dims are equal, here they are {head_dim} and {v_head_dim}"
        return None

    def _gpu_reason(self, device: torch.device) -> str | None:
        if self.devices != ("cuda",):
            return None
        found, majors = capability(device), self.compute_capabilities
        if found is None:
            return "there is no GPU here"
        if found[0] < 8 or (majors is not None and found[0] not in majors):
            wanted = "8.0 and later" if majors is None else " or ".join(f"{major}.x" for major in majors)
            return f"it runs on GPUs of compute capability {wanted}, this one is {found[0]}.{found[1]}"
        return None


#: Capabilities of fused kernels for GPUs, which read channels in vectors of 16 bytes.
FUSED = Capabilities(("cuda",), HALF, max_head_dim=256, head_dim_multiple=8, window=True)


def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability (major, minor) of a GPU; None if CUDA is not available."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


class AttnSpec(NamedTuple):
    """The arguments of a kernel that are equal for all tiles of a layer.

    Attributes:
        scale: factor of the scores, before the cap.
        softcap: c > 0 replaces each score s by c tanh(s / c); 0 for no cap.
    """

    scale: float
    softcap: float = 0.0


class Kernel(Protocol):
    """Attention of query rows against key columns on one device.

    Layout: q and dq are sbhd ``[rows, batch, q_heads, head_dim]``. k and dk are sbhd ``[cols, batch, kv_heads,
    head_dim]``, where kv_heads divides q_heads. out, dout, v and dv have ``v_head_dim`` in place of head_dim. lse is
    ``[rows, batch, q_heads]``, the natural logarithm of the summed exponentials of scaled scores, in the accumulation
    dtype (fp64 for fp64 inputs, else fp32).

    Query tensors have only the rows ``tile.rows``, and key tensors only the columns ``tile.cols``. In a causal tile
    the rows and the columns cover the same positions. With ``tile.cu_seqlens`` the batch size is 1. Both passes raise
    :class:`OptionError` for a window of the tile or a cap of logits that the kernel does not support.
    """

    name: str
    capabilities: Capabilities

    def unsupported_reason(self, inputs: Inputs) -> str | None:
        """Return the reason why the kernel does not support the inputs, as a phrase, or None if it supports them."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: AttnTile, spec: AttnSpec) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of the query rows over the key columns of one tile only."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: AttnTile, spec: AttnSpec
    ) -> Gradients:
        """Return the contribution of one tile to (dq, dk, dv), given the lse of the rows over *all* keys.

        The result depends on ``out`` only through rowsum(dout * out). So ``out`` may be any tensor with the same
        rowsum(dout * out).
        """
        ...


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over tiles: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
