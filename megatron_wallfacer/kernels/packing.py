"""Documents in one call, as libraries take them: thd, and where each document begins and ends."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor


def thd(x_sbhd: Tensor) -> Tensor:
    """sbhd with a batch of 1 as thd, a view; the lse sbh as th."""
    return x_sbhd.squeeze(1)


def unpacked(x_thd: Tensor) -> Tensor:
    """thd as sbhd with a batch of 1, a view; the lse th as sbh."""
    return x_thd.unsqueeze(1)


def lse_ht(lse_s1h: Tensor) -> Tensor:
    """Our lse of a batch of 1 as FlashAttention's ``[heads, rows]``: a copy, it is read without looking at strides."""
    return thd(lse_s1h).t().contiguous()


def lse_s1h(lse_ht: Tensor) -> Tensor:
    """FlashAttention's lse ``[heads, rows]`` as ours of a batch of 1, a view."""
    return unpacked(lse_ht.t())


@lru_cache(maxsize=1024)
def ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where sequences begin and end, int32 ``[sequences + 1]``.

    Made once for all layers, and copied without waiting for the GPU.
    """
    made = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)
