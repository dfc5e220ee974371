"""The predicted time of an attention layer and its best grid, from 64 to 65,536 devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from megatron_wallfacer.planning.choice import AttentionJob
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.search import search
from megatron_wallfacer.schedule.volume import Shape

#: Devices, and tokens per device: 1M tokens on 64 devices, 1G on 65,536.
DEVICES, TOKENS_PER_DEVICE = (64, 256, 1024, 4096, 16384, 65536), 16384
#: Query heads, kv heads by kind of attention, and channels per head.
HEADS, KV_HEADS, HEAD_DIM = 32, {"MHA": 32, "GQA 8": 4}, 128


@dataclass(frozen=True)
class ScalingRow:
    """The best grid at one cluster size.

    Attributes:
        attention: ``MHA`` or ``GQA 8``.
        devices: devices of the cluster.
        tokens: sequence length.
        seconds: time of the layer, forward and backward.
        kernel_s: time of its kernels alone.
        grid, placement: best grid, and its axes, fastest varying first.
        bound_by: resource that limits the best grid.
    """

    attention: str
    devices: int
    tokens: int
    seconds: float
    kernel_s: float
    grid: str
    placement: tuple[str, ...]
    bound_by: str


def scaling_rows(cluster: Cluster, devices: Iterable[int] = DEVICES) -> Iterator[ScalingRow]:
    """Yield the best grid at each size, for both kinds of attention."""
    for size in devices:
        resized = replace(cluster, nodes=max(1, size // cluster.gpus_per_node))
        for attention, kv_heads in KV_HEADS.items():
            best = search(AttentionJob(resized, Shape(TOKENS_PER_DEVICE, HEADS, kv_heads, HEAD_DIM), size)).best[0]
            grid, result = best.plan.grid, best.simulation
            job = attention, size, size * TOKENS_PER_DEVICE
            yield ScalingRow(*job, result.seconds, result.kernel_s, str(grid), grid.placement, best.bound.resource)
