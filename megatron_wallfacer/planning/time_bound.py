"""Formulas for a lower bound of a plan's time, from its kernels and the traffic of its busiest links.

The search simulates plans in the order of an estimate, which this module also computes. In the estimate, the exchange
along ``head`` overlaps only with another head group. In the estimate, a fixed fraction of all communication is exposed.
With measured kernels the kernel time is scaled from a few sampled ring steps to all ring steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from megatron_wallfacer.planning.cluster import Cluster, Device, SwitchLevel
from megatron_wallfacer.planning.measured_kernels import (
    BACKWARD_FLOPS,
    FORWARD_FLOPS,
    best_rate,
    call_seconds,
    mean_head_dim,
)
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK, shard_chunks
from megatron_wallfacer.schedule.ops import DKV, DOUT, DQ, KV, PARTIAL_OUT, Q
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.tiles import Tile, tiles
from megatron_wallfacer.schedule.volume import Shape

#: Exposed part of the traffic in the estimate. With this value the fastest of 462 grids was among the first 24 in each
#: of four settings of 32 and 64 ranks in which all grids were simulated.
EXPOSED = 0.2
#: Number of ring steps whose tiles are sampled, at equal distances.
SAMPLES = 4
_RINGS = ("ring_outer", "ring_inner")


@dataclass(frozen=True)
class TimeBound:
    """Lower bound of the time of one attention layer, forward and backward, with complete overlap.

    Attributes:
        by_resource: seconds by resource. The keys are ``compute`` (attention kernels), ``links in a node``, ``NICs``
            and ``switches`` (above the nodes).
        exchange_s: seconds of the exchange along ``head`` at the full rate of its links.
        traffic_s: seconds of all traffic that a rank receives, at the full rate of its links.
    """

    by_resource: Mapping[str, float]
    exchange_s: float
    traffic_s: float

    @property
    def kernel_s(self) -> float:
        """Return the seconds of the attention kernels."""
        return self.by_resource["compute"]

    @property
    def resource(self) -> str:
        """Return the name of the resource that sets the bound."""
        return max(self.by_resource, key=self.by_resource.__getitem__)

    @property
    def seconds(self) -> float:
        """Return the lower bound in seconds. It is the time of the busiest resource: kernels or one kind of link."""
        return self.by_resource[self.resource]

    def estimate_s(self, head_groups: int, kernel_s: float) -> float:
        """Return an estimate of the time in seconds. The search orders plans by this estimate.

        Transfers of a head group overlap kernels of other head groups. ``kernel_s`` is the kernel time in seconds.
        """
        return max(self.seconds, kernel_s + self.exchange_s / head_groups) + EXPOSED * self.traffic_s


def time_bound(
    plan: Plan, cluster: Cluster, shape: Shape, *, causal: bool = True, keep_gathered_q: bool = False
) -> TimeBound:
    """Return the lower bound of the time of a plan. Rank r of the plan runs on device r."""
    by_axis = bytes_by_axis(plan, shape, keep_gathered_q=keep_gathered_q)
    grid, per_node = plan.grid, cluster.gpus_per_node
    ranks_per_nic, nics = max(1, per_node // cluster.nics), max(1.0, cluster.nics / per_node)
    busiest = sum(size * _edge(plan, axis, per_node) for axis, size in by_axis.items())
    shared = sum(size * _mean_crossing(grid, axis, per_node) for axis, size in by_axis.items()) * ranks_per_nic
    inside = sum(size * _staying(grid, axis, per_node) for axis, size in by_axis.items())
    alone = {axis: _alone_s(size, _crossing(grid, axis, per_node), cluster) for axis, size in by_axis.items()}
    by_resource = {
        "compute": kernel_seconds(grid.cp_size, cluster, shape, causal=causal),
        "links in a node": cluster.intra.seconds(inside),
        "NICs": cluster.inter.seconds(max(busiest, shared) / nics),
        "switches": max((_level_s(grid, by_axis, cluster, level) for level in cluster.levels), default=0.0),
    }
    return TimeBound(by_resource, alone.get("head", 0.0), sum(alone.values()))


def kernel_seconds(cp_size: int, cluster: Cluster, shape: Shape, *, causal: bool = True) -> float:
    """Return the seconds of a rank's attention kernels if all calls are large. All schemes have this time in common."""
    device = cluster.device
    work = unmasked_pairs(cp_size, shape, causal=causal) * shape.q_heads * mean_head_dim(shape)
    seconds = work * sum(pass_weights(device))
    return seconds if device.kernels is not None else seconds / (device.tflops * 1e12)


def unmasked_pairs(cp_size: int, shape: Shape, *, causal: bool) -> float:
    """Return the number of unmasked pairs of query and key rows per rank, for any scheme."""
    return shape.tokens * shape.tokens * cp_size * shape.batch * (0.5 if causal else 1.0)


def pass_weights(device: Device) -> tuple[float, float]:
    """Return the time of (forward, backward) per query-key pair and channel of the head dim, in large attention calls.

    Without measured kernels, the result divided by the peak rate in FLOP/s is the time in seconds.
    """
    if device.kernels is None:
        return FORWARD_FLOPS / device.forward, BACKWARD_FLOPS / device.backward
    forward, backward = (best_rate(device.kernels, backward=backward) for backward in (False, True))
    return FORWARD_FLOPS / forward, BACKWARD_FLOPS / backward


def estimated_kernel_seconds(plan: Plan, cluster: Cluster, shape: Shape, *, causal: bool = True) -> float:
    """Return the estimated seconds of a rank's attention calls, forward and backward, with host time.

    Each attention call in the sampled ring steps takes the longer of its device time and its host time. Without
    measured kernels the result equals the lower bound.
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
    """Return the tiles of rank 0 in a few evenly spaced ring steps."""
    q_chunks = _chunks(grid, 0, ("head", "team"))
    sampled: list[Tile] = []
    for number in range(min(SAMPLES, grid.ring)):
        position = number * grid.ring // min(SAMPLES, grid.ring)
        outer, inner = divmod(position, grid.ring_inner)
        first = grid.rank(grid.coordinates(0) | {"ring_outer": outer, "ring_inner": inner})
        sampled += tiles(q_chunks, _chunks(grid, first, ("head", "kv_team")), causal=causal)
    return tuple(sampled)


def _chunks(grid: Grid, rank: int, axes: tuple[str, str]) -> tuple[int, ...]:
    ranks = [rank]
    for axis in axes:
        ranks = [other + first - rank for first in grid.neighbours(rank, axis) for other in ranks]
    return tuple(sorted(chunk for member in ranks for chunk in shard_chunks(member, grid.cp_size)))


def bytes_by_axis(plan: Plan, shape: Shape, *, keep_gathered_q: bool = False) -> Counter[str]:
    """Return the bytes that a rank receives along each axis, forward and backward, with softmax statistics.

    The result holds for ``kv_order`` native. With other orders a rank may receive more bytes.
    """
    grid = plan.grid
    received: Counter[str] = Counter()
    for backward, operand, axis, inputs, results in (
        (False, "q", "team", Q, PARTIAL_OUT),
        (False, "kv", "kv_team", KV, ()),
        (True, "q", "team", (*Q, *DOUT), DQ),
        (True, "kv", "kv_team", KV, DKV),
    ):
        team = grid.size_of(axis)
        in_bytes, out_bytes = (sum(_shard_bytes(plan, shape, name) for name in names) for names in (inputs, results))
        received[axis] += (team - 1) * (in_bytes + out_bytes)
        if operand == plan.ring_operand(backward=backward):
            if results == PARTIAL_OUT:
                # Partial outputs of the ring operand are sent to their origin rank directly.
                received["cp"] += team * (grid.ring - 1) * out_bytes
                out_bytes = 0.0
            received["ring_outer"] += team * (grid.ring_outer - 1) * (in_bytes + out_bytes)
            received["ring_inner"] += team * (grid.ring - grid.ring_outer) * (in_bytes + out_bytes)
    if keep_gathered_q:
        received["team"] -= (grid.team - 1) * _shard_bytes(plan, shape, "q")
    # Each tensor is exchanged once: q, k, v and out in forward, dout with its statistics and all gradients in backward.
    exchanged = (*Q, *KV, *PARTIAL_OUT, *DOUT, *DQ, *DKV)
    received["head"] += sum(_shard_bytes(plan, shape, name) for name in exchanged) * (grid.head - 1) / grid.head
    return Counter({axis: size for axis, size in received.items() if size})


def _shard_bytes(plan: Plan, shape: Shape, tensor: str) -> float:
    """Return the bytes of one rank's shard after the exchange of heads. Several ranks may have the same kv head."""
    copies = max(1.0, plan.grid.head / shape.kv_heads) if tensor in (*KV, *DKV) else 1.0
    return shape.bytes(tensor) * copies


def _extent(grid: Grid, axis: str) -> tuple[int, int]:
    """Return (distance of neighbours in ranks, number of ranks) of an axis; for ``cp``, of the whole grid."""
    ranks = range(grid.cp_size) if axis == "cp" else grid.neighbours(0, axis)
    return (ranks[1] if len(ranks) > 1 else 1), len(ranks)


def _crossing(grid: Grid, axis: str, unit: int) -> float:
    """Return the fraction of an axis's messages that leave a node of ``unit`` ranks, for the rank with the most."""
    stride, size = _extent(grid, axis)
    if size == 1 or stride * size <= unit:
        return 0.0
    if stride >= unit or axis in _RINGS:
        return 1.0
    mates = unit // stride
    return (size - mates) / (size - 1)


def _edge(plan: Plan, axis: str, unit: int) -> float:
    """Return :func:`_crossing`, halved if a rank of a bidirectional ring sends to other nodes in one direction only."""
    stride, _ = _extent(plan.grid, axis)
    halved = plan.bidirectional and axis in _RINGS and stride < unit
    return _crossing(plan.grid, axis, unit) * (0.5 if halved else 1.0)


def _staying(grid: Grid, axis: str, unit: int) -> float:
    """Return the fraction of an axis's messages that stay in a node of ``unit`` ranks, for the rank with the most."""
    if axis in _RINGS and _extent(grid, axis)[0] < unit:
        return 1.0
    return 1.0 - _crossing(grid, axis, unit)


def _mean_crossing(grid: Grid, axis: str, unit: int) -> float:
    """Return the fraction of an axis's messages that leave a node of ``unit`` ranks, as a mean of all ranks."""
    (stride, _), crossing = _extent(grid, axis), _crossing(grid, axis, unit)
    if axis in _RINGS and crossing and stride < unit:
        return stride / unit
    return crossing


def _level_s(grid: Grid, by_axis: Counter[str], cluster: Cluster, level: SwitchLevel) -> float:
    ranks = level.nodes * cluster.gpus_per_node
    if ranks >= grid.cp_size:
        return 0.0
    size = sum(size * _mean_crossing(grid, axis, ranks) for axis, size in by_axis.items()) * ranks
    rate = (cluster.inter.gbyte_s or float("inf")) * cluster.nics * level.nodes / level.oversubscription
    return size / (rate * 1e9)


def _alone_s(size: float, crossing: float, cluster: Cluster) -> float:
    """Return the seconds to send ``size`` bytes over idle links. ``crossing`` is the fraction sent between nodes."""
    return cluster.inter.seconds(size * crossing) + cluster.intra.seconds(size * (1 - crossing))
