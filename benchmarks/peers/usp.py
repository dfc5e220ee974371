"""yunchang: Unified Sequence Parallelism, Ulysses around a zig-zag ring."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers.loading import load, use_kernel
from benchmarks.peers.ring_flash import FP32_NOTE
from megatron_wallfacer.kernels.protocol import Kernel
from megatron_wallfacer.schedule.volume import Shape


class Usp:
    """``yunchang.LongContextAttention`` with heads split over neighbouring ranks (its default)."""

    package = "yunchang"
    check_dtype = "float64"
    note = FP32_NOTE

    def __init__(self, heads: int, ring: int) -> None:
        """With so many ranks a head group, and so many on each ring."""
        self.label = f"usp-{heads}"
        self._degrees = heads, ring

    def prepare(self) -> None:
        yunchang, (heads, ring) = load(self.package), self._degrees
        yunchang.set_seq_parallel_pg(heads, ring, dist.get_rank(), dist.get_world_size())
        # Groups are in a global of theirs, that the next degree overwrites; the module keeps those of now.
        self._attend = yunchang.LongContextAttention(ring_impl_type="zigzag")

    def shard(self, whole: Tensor) -> Tensor:
        # Their EXTRACT_FUNC_DICT["zigzag"], which reads the global: the ring's zig-zag, then a stretch of it for each
        # rank of the head group.
        (heads, ring), module = self._degrees, self._attend
        position, part = dist.get_rank(module.ring_pg), dist.get_rank(module.ulysses_pg)
        chunks = whole.chunk(2 * ring, dim=1)
        pair = torch.cat([chunks[position], chunks[2 * ring - 1 - position]], dim=1)
        return pair.chunk(heads, dim=1)[part].contiguous()

    def bind(self, kernel: Kernel) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Attention of q, k and v, bshd, with all else bound once."""
        use_kernel(kernel)
        return partial(self._attend, causal=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
        return self.bind(kernel)(q, k, v)

    def schedules(self, rank: int, shape: Shape) -> None:
        return None
