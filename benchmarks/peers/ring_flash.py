"""ring-flash-attention: the zig-zag ring."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers.loading import load, use_kernel
from megatron_wallfacer.kernels.protocol import Kernel
from megatron_wallfacer.schedule.volume import Shape

FP32_NOTE = "fp32 gradients wrong (benchmarks.peers.minimal), checked in fp64"


class RingFlashAttention:
    """``ring_flash_attn.zigzag_ring_flash_attn_func`` over the whole world."""

    label = "rfa-zigzag"
    package = "ring_flash_attn"
    # Its sums are fp32 by `buffer.to(torch.float32)`, which for an fp32 buffer is no copy but the buffer itself, and
    # the next step overwrites it. With fp64 inputs the sums are fp32 all the same: the algorithm is what is checked.
    check_dtype = "float64"
    note = FP32_NOTE

    def prepare(self) -> None:
        self._attend = load(self.package).zigzag_ring_flash_attn_func

    def shard(self, whole: Tensor) -> Tensor:
        rank, size = dist.get_rank(), dist.get_world_size()
        chunks = whole.chunk(2 * size, dim=1)
        return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)

    def bind(self, kernel: Kernel) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Attention of q, k and v, bshd, with all else bound once."""
        use_kernel(kernel)
        return partial(self._attend, causal=True, group=dist.group.WORLD)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
        return self.bind(kernel)(q, k, v)

    def schedules(self, rank: int, shape: Shape) -> None:
        return None
