"""Boundaries of documents as the libraries take them: ``cu_seqlens`` tensors and the longest document."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def cu_seqlens_tensor(boundaries: tuple[int, ...], device: torch.device) -> Tensor:
    """Return boundaries as int32 ``[documents + 1]`` on a device.

    Built once for all layers, and copied without waiting for the GPU.
    """
    made = torch.tensor(boundaries, dtype=torch.int32, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


def longest(boundaries: tuple[int, ...]) -> int:
    """Return the tokens of the longest document."""
    return max(end - start for start, end in pairwise(boundaries))
