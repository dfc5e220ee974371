"""Boundaries of documents as the libraries take them: ``cu_seqlens`` tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_wallfacer.kernels.byte_cache import INTEGER_BYTES, byte_cache

#: Boundaries that are kept, with their copies on the device.
_LIMIT = 64 << 20


def _nbytes(boundaries: tuple[int, ...], device: torch.device) -> int:
    """Bytes of the tuple, of the pinned copy and of the tensor."""
    return len(boundaries) * (INTEGER_BYTES + 2 * torch.int32.itemsize)


@byte_cache(_LIMIT, _nbytes)
def cu_seqlens_tensor(boundaries: tuple[int, ...], device: torch.device) -> Tensor:
    """Return boundaries as int32 ``[documents + 1]`` on a device.

    Built once for all layers, and copied without waiting for the GPU.
    """
    made = torch.tensor(boundaries, dtype=torch.int32, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)
