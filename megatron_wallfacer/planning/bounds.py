"""How fast a plan can be at best on a cluster: its kernels, and what its busiest link carries. In closed form.

Beside it a guess of what it takes, to try the likely ones first: what is exchanged along ``head`` has nothing to hide
behind but the other group of heads, and of everything else some part always stands out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.kernels import BACKWARD_FLOPS, FORWARD_FLOPS, best_rate
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.ops import DKV, DOUT, DQ, KV, PARTIAL_OUT, Q
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.volume import Shape

#: Part of what is moved that nothing hides, in the guess. With it the best of 462 grids was among the first 24 in each
#: of four settings of 32 and 64 ranks in which all were played.
STANDS_OUT = 0.2
_RINGS = ("ring_outer", "ring_inner")


@dataclass(frozen=True)
class Bound:
    """Seconds of one attention layer, forward and backward, below which no overlap can bring it.

    Attributes:
        kernel_s: attention kernels alone.
        intra_s: a device's port to its node.
        inter_s: the busiest network card.
        level_s: the busiest switch above.
        exchange_s: the exchange along ``head`` alone, at the full rate of its links.
        moved_s: everything that a rank receives, at the full rate of its links.
    """

    kernel_s: float
    intra_s: float
    inter_s: float
    level_s: float
    exchange_s: float
    moved_s: float

    @property
    def seconds(self) -> float:
        """The longest of them."""
        return max(self.kernel_s, self.intra_s, self.inter_s, self.level_s)

    def guess_s(self, head_groups: int, kernel_s: float) -> float:
        """A guess of the time, for the order in which plans are tried only.

        Args:
            head_groups: groups of heads that are pipelined.
            kernel_s: estimated seconds of the kernels.
        """
        return max(self.seconds, kernel_s + self.exchange_s / head_groups) + STANDS_OUT * self.moved_s

    @property
    def by(self) -> str:
        """What it is that takes so long."""
        named = {
            "compute": self.kernel_s,
            "links in a node": self.intra_s,
            "network cards": self.inter_s,
            "switches": self.level_s,
        }
        return max(named, key=named.__getitem__)


def bound(plan: Plan, cluster: Cluster, shape: Shape, *, causal: bool = True, q_kept: bool = False) -> Bound:
    """The bound of a plan.

    Args:
        plan: grid and choices.
        cluster: on which the ranks stand in order.
        shape: of a rank's shard.
        causal: half of all pairs are live.
        q_kept: the team's queries are kept from forward.
    """
    by_axis = bytes_by_axis(plan, shape, q_kept=q_kept)
    grid, per_node = plan.grid, cluster.gpus_per_node
    sharing, cards = max(1, per_node // cluster.nics), max(1.0, cluster.nics / per_node)
    busiest = sum(size * _edge(plan, axis, per_node) for axis, size in by_axis.items())
    shared = sum(size * _leaving(grid, axis, per_node) for axis, size in by_axis.items()) * sharing
    inside = sum(size * _staying(grid, axis, per_node) for axis, size in by_axis.items())
    moved = {axis: _alone_s(size, _crossing(grid, axis, per_node), cluster) for axis, size in by_axis.items()}
    return Bound(
        kernel_s=kernel_seconds(plan.grid.cp_size, cluster, shape, causal=causal),
        intra_s=cluster.intra.seconds(inside),
        inter_s=cluster.inter.seconds(max(busiest, shared) / cards),
        level_s=max((_level_s(grid, by_axis, cluster, number) for number in range(len(cluster.levels))), default=0.0),
        exchange_s=moved.get("head", 0.0),
        moved_s=sum(moved.values()),
    )


def kernel_seconds(cp_size: int, cluster: Cluster, shape: Shape, *, causal: bool = True) -> float:
    """Of a rank's attention kernels at the rate of large calls; every scheme has as much to compute."""
    device = cluster.device
    channels = (shape.head_dim + (shape.v_head_dim or shape.head_dim)) / 2
    pairs = shape.tokens * shape.tokens * cp_size * (0.5 if causal else 1.0)
    work = pairs * shape.q_heads * channels * shape.batch
    if device.kernels is not None:
        forward, backward = (best_rate(device.kernels, backward=backward) for backward in (False, True))
        return work * (FORWARD_FLOPS / forward + BACKWARD_FLOPS / backward)
    return work * (FORWARD_FLOPS / device.forward + BACKWARD_FLOPS / device.backward) / (device.tflops * 1e12)


def bytes_by_axis(plan: Plan, shape: Shape, *, q_kept: bool = False) -> Counter[str]:
    """Bytes that a rank receives along each axis, forward and backward; statistics among them.

    The published order of K and V is counted as if its blocks were native: it moves no less.
    """
    found: Counter[str] = Counter()
    passes = ((plan.forward, Q, KV, PARTIAL_OUT, ()), (plan.backward, (*Q, *DOUT), KV, DQ, DKV))
    for rider, q_in, kv_in, q_out, kv_out in passes:
        for side, inputs, results in (("q", q_in, q_out), ("kv", kv_in, kv_out)):
            _count(found, plan, shape, side, inputs, results, rides=side == rider)
    if q_kept:
        found["team"] -= (plan.grid.team - 1) * _size(plan, shape, "q")
    # Exchanged once each: q, k, v and out; in backward dout (with its statistics) and all gradients.
    head = plan.grid.head
    exchanged = (*Q, *KV, *PARTIAL_OUT, *DOUT, *DQ, *DKV)
    found["head"] += sum(_size(plan, shape, name) for name in exchanged) * (head - 1) / head
    return Counter({axis: size for axis, size in found.items() if size})


def _count(
    found: Counter[str],
    plan: Plan,
    shape: Shape,
    side: str,
    inputs: tuple[str, ...],
    results: tuple[str, ...],
    *,
    rides: bool,
) -> None:
    """What one side of one pass moves: to and from its team, and if it rides round the ring in blocks of a team."""
    grid = plan.grid
    axis = "team" if side == "q" else "kv_team"
    team = grid.size_of(axis)
    coming, going = (sum(_size(plan, shape, name) for name in names) for names in (inputs, results))
    found[axis] += (team - 1) * (coming + going)
    if not rides:
        return
    if results == PARTIAL_OUT:
        # What rides in forward is computed elsewhere and goes straight home from there.
        found["cp"] += team * (grid.ring - 1) * going
        going = 0.0
    found["ring_outer"] += team * (grid.ring_outer - 1) * (coming + going)
    found["ring_inner"] += team * (grid.ring - grid.ring_outer) * (coming + going)


def _size(plan: Plan, shape: Shape, tensor: str) -> float:
    """Bytes of a shard after the exchange of heads; kv heads that several ranks have count in each."""
    copies = max(1.0, plan.grid.head / shape.kv_heads) if tensor in (*KV, *DKV) else 1.0
    return shape.bytes(tensor) * copies


def _extent(grid: Grid, axis: str) -> tuple[int, int]:
    """How far apart neighbours along an axis are, and how many there are; ``cp`` is all ranks."""
    if axis == "cp":
        return 1, grid.cp_size
    stride = 1
    for other in grid.placement:
        if other == axis:
            break
        stride *= grid.size_of(other)
    return stride, grid.size_of(axis)


def _crossing(grid: Grid, axis: str, unit: int) -> float:
    """Part of the bytes along an axis that the rank with most of them gets from other units of so many ranks."""
    stride, size = _extent(grid, axis)
    if size == 1 or stride * size <= unit:
        return 0.0
    if stride >= unit or axis in _RINGS:
        return 1.0
    mates = unit // stride
    return (size - mates) / (size - 1)


def _edge(plan: Plan, axis: str, unit: int) -> float:
    """The same, but of a ring that goes both ways only half comes to the rank at the edge from beyond it."""
    stride, _ = _extent(plan.grid, axis)
    halved = plan.bidirectional and axis in _RINGS and stride < unit
    return _crossing(plan.grid, axis, unit) * (0.5 if halved else 1.0)


def _staying(grid: Grid, axis: str, unit: int) -> float:
    """Part of the bytes along an axis that the rank with most of them gets from its own unit."""
    if axis in _RINGS and _extent(grid, axis)[0] < unit:
        return 1.0
    return 1.0 - _crossing(grid, axis, unit)


def _leaving(grid: Grid, axis: str, unit: int) -> float:
    """The same, of the mean rank: on a ring only those at the edge of a unit cross it."""
    (stride, _), crossing = _extent(grid, axis), _crossing(grid, axis, unit)
    if axis in _RINGS and crossing and stride < unit:
        return stride / unit
    return crossing


def _level_s(grid: Grid, by_axis: Counter[str], cluster: Cluster, number: int) -> float:
    level = cluster.levels[number]
    ranks = level.nodes * cluster.gpus_per_node
    if ranks >= grid.cp_size:
        return 0.0
    size = sum(size * _leaving(grid, axis, ranks) for axis, size in by_axis.items()) * ranks
    rate = (cluster.inter.gbyte_s or float("inf")) * cluster.nics * level.nodes / level.oversubscription
    return size / (rate * 1e9)


def _alone_s(size: float, crossing: float, cluster: Cluster) -> float:
    """Bytes of one axis, of which a part comes from other nodes, if nothing else moved."""
    return cluster.inter.seconds(size * crossing) + cluster.intra.seconds(size * (1 - crossing))
