"""Estimated kernel time of a plan on measured kernels, from the tiles of a few ring steps.

A search simulates the plans with the lowest estimates first. The traffic of a plan does not show that it has many small
tiles: a block of ranks that are not consecutive has one tile per chunk.
"""

from __future__ import annotations

from functools import lru_cache

from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.measured_kernels import BACKWARD_FLOPS, FORWARD_FLOPS, call_seconds, mean_head_dim
from megatron_wallfacer.planning.time_bound import kernel_seconds, unmasked_pairs
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK, shard_chunks
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.tiles import Tile, tiles
from megatron_wallfacer.schedule.volume import Shape

#: Ring steps whose tiles are sampled, evenly spaced.
SAMPLES = 4


def estimated_kernel_seconds(plan: Plan, cluster: Cluster, shape: Shape, *, causal: bool = True) -> float:
    """Return the estimated seconds of a rank's attention calls, forward and backward, with host time.

    Each call of the sampled ring steps takes the longer of its device and host time. Without measured kernels the
    result is the bound.
    """
    device = cluster.device
    if device.kernels is None:
        return kernel_seconds(plan.grid.cp_size, cluster, shape, causal=causal)
    heads = shape.q_heads / plan.grid.head / head_groups(plan, shape.q_heads, shape.kv_heads)
    channels = mean_head_dim(shape)
    chunk_pairs = (shape.tokens / CHUNKS_PER_RANK) ** 2 * shape.batch
    sampled = _sampled_tiles(plan.grid, causal)
    seconds = 0.0
    for backward, host_us in ((False, device.host_forward_us), (True, device.host_backward_us)):
        for tile in sampled:
            size = tile.area * chunk_pairs, heads, channels
            call_s = call_seconds(device.kernels, *size, backward=backward, causal=tile.causal)
            seconds += max(call_s + device.call_us * 1e-6, host_us * 1e-6)
    pairs = sum(tile.area for tile in sampled) * chunk_pairs
    sampled_flops = pairs * heads * channels * (FORWARD_FLOPS + BACKWARD_FLOPS)
    all_pairs = unmasked_pairs(plan.grid.cp_size, shape, causal=causal)
    all_flops = all_pairs * shape.q_heads * channels * (FORWARD_FLOPS + BACKWARD_FLOPS)
    return seconds * all_flops / sampled_flops


@lru_cache(maxsize=256)
def _sampled_tiles(grid: Grid, causal: bool) -> tuple[Tile, ...]:
    """Return the tiles of rank 0's query block with the key blocks of some ring positions."""
    q_chunks = _chunks(grid, 0, ("head", "team"))
    sampled: list[Tile] = []
    for number in range(min(SAMPLES, grid.ring)):
        position = number * grid.ring // min(SAMPLES, grid.ring)
        outer, inner = divmod(position, grid.ring_inner)
        first = grid.rank(grid.coordinates(0) | {"ring_outer": outer, "ring_inner": inner})
        sampled += tiles(q_chunks, _chunks(grid, first, ("head", "kv_team")), causal=causal)
    return tuple(sampled)


def _chunks(grid: Grid, rank: int, axes: tuple[str, str]) -> tuple[int, ...]:
    """Return the chunks of the block that a rank shares along two axes, ascending."""
    ranks = [rank]
    for axis in axes:
        ranks = [other + first - rank for first in grid.neighbours(rank, axis) for other in ranks]
    return tuple(sorted(chunk for member in ranks for chunk in shard_chunks(member, grid.cp_size)))
