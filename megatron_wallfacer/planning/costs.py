"""Device and host times of a schedule's operations, without communication, and a rank's program with these times."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.measured_kernels import BACKWARD_FLOPS, FORWARD_FLOPS, call_seconds, mean_head_dim
from megatron_wallfacer.schedule.held import accumulations
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.lifetimes import aliases, local_views
from megatron_wallfacer.schedule.ops import Accumulate, Attend, Concat, Op, Schedule, SendRecv, View, WriteResult, reads
from megatron_wallfacer.schedule.tiles import Tile
from megatron_wallfacer.schedule.volume import Shape, rows_bytes

#: Memory accesses per byte of a result. Merging reads result and accumulator and writes the accumulator. Copying reads
#: and writes the result.
MERGED, COPIED = 3, 2
#: Memory accesses per byte of ``out_proxy`` (engine.merge) if PyTorch's operators compute it on a CPU: a
#: copy in fp64 and its norm, a quotient, a product, temporaries. On a GPU one kernel reads dO and writes the proxy.
OUT_PROXY = 10


@dataclass(frozen=True, slots=True)
class OpCost:
    """The cost of one operation.

    Attributes:
        kernel_s: device seconds of attention kernels.
        memory_bytes: bytes that merging and copying move through memory.
        sends: bytes of each message that the operation sends.
        launch_s: device seconds of copies, merges and sums in addition to the time for their bytes.
        host_s: host seconds to issue all launches and messages.
    """

    kernel_s: float = 0.0
    memory_bytes: float = 0.0
    sends: tuple[float, ...] = ()
    launch_s: float = 0.0
    host_s: float = 0.0


class CostModel:
    """Costs of the operations of a schedule on a cluster, for the sizes of one rank's shard.

    With ``out_proxy`` the costs of backward include computing ``out_proxy`` from dO and delta.
    """

    def __init__(self, cluster: Cluster, shape: Shape, *, out_proxy: bool = True) -> None:
        self.cluster, self.shape, self._out_proxy = cluster, shape, out_proxy

    def op_costs(self, schedule: Schedule) -> list[OpCost]:
        """Return the cost of each operation, in order."""
        views = {op.into for op in schedule.ops if isinstance(op, View)}
        costs = [self._op_cost(op, schedule, views) for op in schedule.ops]
        # One launch accumulates the results of two tiles, or consecutive received rows.
        for index, launches in accumulations(schedule, self.shape, aliases(schedule)).items():
            # Rows that are sent are accumulated directly into their message.
            if not (isinstance(schedule.ops[index], SendRecv) and costs[index].memory_bytes):
                costs[index] = self._with_launches(costs[index], launches)
        if self._out_proxy and schedule.backward:
            for index, rows in _out_proxy_rows(schedule).items():
                dout = rows_bytes(schedule, self.shape, ("dout",), rows)
                nbytes = COPIED * dout
                if self.cluster.host is not None:
                    nbytes = OUT_PROXY * dout * self.shape.accumulate_itemsize / self.shape.itemsize
                cost = replace(costs[index], memory_bytes=costs[index].memory_bytes + nbytes)
                costs[index] = self._with_launches(cost, 1)
        return costs

    def call_host_s(self, schedule: Schedule) -> float:
        """Return the host time of one attention call in a pass, in seconds."""
        device = self.cluster.device
        return 1e-6 * (device.host_backward_us if schedule.backward else device.host_forward_us)

    def _op_cost(self, op: Op, schedule: Schedule, views: Collection[str]) -> OpCost:
        match op:
            case Attend():
                return self._attend(op, schedule)
            case Concat(into=into, sources=sources) if len(sources) > 1:
                return self._with_launches(OpCost(memory_bytes=COPIED * self._bytes(schedule, into)), 1)
            case Accumulate(source=source):
                return OpCost(memory_bytes=MERGED * self._bytes(schedule, source))
            case WriteResult(sources=sources):
                # WriteResult copies only the local rows of an accumulator, which may have more rows.
                payloads = (schedule.values[source].payload for source in sources)
                stored = sum(rows_bytes(schedule, self.shape, payload, CHUNKS_PER_RANK) for payload in payloads)
                return OpCost(memory_bytes=COPIED * stored)
            case SendRecv():
                return self._transfer(op, schedule, views)
        return OpCost()

    def _transfer(self, op: SendRecv, schedule: Schedule, views: Collection[str]) -> OpCost:
        transfer = op.transfer
        sizes = [rows_bytes(schedule, self.shape, transfer.payload, len(message.chunks)) for message in transfer.sends]
        # A whole value that has its own buffer is sent without a copy.
        copied = [
            size
            for size, message in zip(sizes, transfer.sends, strict=True)
            if message.value in views or len(message.chunks) < len(schedule.values[message.value].chunks)
        ]
        posted_s = 1e-6 * self.cluster.device.host_transfer_us
        cost = OpCost(memory_bytes=COPIED * sum(copied), sends=tuple(sizes), host_s=posted_s)
        return self._with_launches(cost, 1 if copied else 0)

    def _with_launches(self, cost: OpCost, launches: int) -> OpCost:
        """Add launches to a cost. All copies, merges or sums of one operation are one launch."""
        device = self.cluster.device
        return replace(
            cost,
            launch_s=cost.launch_s + 1e-6 * launches * device.launch_us,
            host_s=cost.host_s + 1e-6 * launches * device.host_launch_us,
        )

    def _attend(self, op: Attend, schedule: Schedule) -> OpCost:
        shape = self.shape
        kernel_s = self._kernels_s(op.tiles, schedule) + len(op.tiles) * self.cluster.device.call_us * 1e-6
        rows = sum(tile.rows[1] - tile.rows[0] for tile in op.tiles)
        cols = sum(tile.cols[1] - tile.cols[0] for tile in op.tiles)
        merged = rows_bytes(schedule, shape, ("dq",) if schedule.backward else ("out", "lse"), rows)
        if schedule.backward:
            merged += rows_bytes(schedule, shape, ("dk", "dv"), cols)
        return OpCost(kernel_s, MERGED * merged, host_s=len(op.tiles) * self.call_host_s(schedule))

    def _kernels_s(self, tiles: tuple[Tile, ...], schedule: Schedule) -> float:
        device, shape = self.cluster.device, self.shape
        chunk = shape.tokens / CHUNKS_PER_RANK
        heads = shape.q_heads / schedule.head_slices
        channels = mean_head_dim(shape)
        if device.kernels is not None:
            each = chunk * chunk * shape.batch, heads, channels
            return sum(
                call_seconds(device.kernels, t.area * each[0], *each[1:], backward=schedule.backward, causal=t.causal)
                for t in tiles
            )
        flops, rate = (BACKWARD_FLOPS, device.backward) if schedule.backward else (FORWARD_FLOPS, device.forward)
        work = flops * sum(tile.area for tile in tiles) * chunk * chunk * heads * channels * shape.batch
        return work / (device.tflops * 1e12 * rate)

    def _bytes(self, schedule: Schedule, name: str) -> float:
        value = schedule.values[name]
        return rows_bytes(schedule, self.shape, value.payload, len(value.chunks))


def _out_proxy_rows(schedule: Schedule) -> dict[int, int]:
    """Return a map from operation index to the number of query chunks for which it computes ``out_proxy``."""
    first: dict[tuple[str, ...], int] = {}
    views = local_views(schedule)
    for index, op in enumerate(schedule.ops):
        # Local rows have their output, so they need no proxy.
        if isinstance(op, Attend) and not views.issuperset(op.q):
            first.setdefault(op.q, index)
    values = schedule.values
    return {
        index: sum(len(values[name].chunks) for name in names if "dout" in values[name].payload)
        for names, index in first.items()
    }


@dataclass(frozen=True, slots=True)
class TimedOp:
    """An operation of a rank's program with its cost and its time on the host.

    Attributes:
        pass_number: index of the pass.
        schedule: schedule of the pass.
        op: operation; None at the end of the pass.
        reads: names of the values that the operation reads.
        cost: cost of the operation.
        first_issued_s: seconds from the start of the pass until the host has issued the operation's first attention
            call. The host issues one operation after the other without waiting.
        issued_s: seconds from the start of the pass until the host has issued the whole operation.
    """

    pass_number: int
    schedule: Schedule
    op: Op | None
    reads: tuple[str, ...]
    cost: OpCost
    first_issued_s: float = 0.0
    issued_s: float = 0.0

    @property
    def name(self) -> str:
        """Return the name of the operation's type; empty at the end of the pass."""
        return "" if self.op is None else type(self.op).__name__


def rank_program(schedules: Sequence[Schedule], costs: CostModel) -> list[TimedOp]:
    """Return the program of a rank: the operations of all its passes in order, with their costs."""
    program: list[TimedOp] = []
    for number, schedule in enumerate(schedules):
        call_s, issued_s = costs.call_host_s(schedule), 0.0
        for op, cost in zip(schedule.ops, costs.op_costs(schedule), strict=True):
            first_issued_s = issued_s + (min(call_s, cost.host_s) if cost.kernel_s else cost.host_s)
            issued_s += cost.host_s
            program.append(TimedOp(number, schedule, op, reads(op), cost, first_issued_s, issued_s))
        program.append(TimedOp(number, schedule, None, (), OpCost()))
    return program
