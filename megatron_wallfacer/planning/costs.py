"""What the operations of a schedule take on a device, communication apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.kernels import BACKWARD_FLOPS, FORWARD_FLOPS, call_seconds
from megatron_wallfacer.schedule.held import accumulations
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.memory import aliases, own_views
from megatron_wallfacer.schedule.ops import Assemble, Attend, Fold, Load, Op, Schedule, Start, Store
from megatron_wallfacer.schedule.tiles import Tile
from megatron_wallfacer.schedule.volume import Shape, rows_bytes

#: Times that a byte of a result crosses memory: merged (part and sum read, sum written), copied (read, written).
MERGED, COPIED = 3, 2
#: And a byte of a stand-in for the output (engine.merge.out_proxy) where PyTorch's operators make it, as on a
#: CPU: a copy in fp64 and its norm, a quotient, a product, temporaries. A GPU's kernel reads dO and writes the
#: stand-in.
STAND_IN = 10


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one operation.

    Attributes:
        kernel_s: seconds of attention kernels.
        touched: bytes that merging and copying move through memory.
        sends: bytes of each message that it starts.
        launch_s: seconds of the device for launches that are not attention kernels, beside their bytes.
        host_s: seconds in which the host issues all launches and messages.
    """

    kernel_s: float = 0.0
    touched: float = 0.0
    sends: tuple[float, ...] = ()
    launch_s: float = 0.0
    host_s: float = 0.0


class Costs:
    """Of the operations of a schedule.

    Args:
        cluster: device and host.
        shape: of a rank's shard.
        stand_ins: made in backward where an output is wanted, as our engine does.
    """

    def __init__(self, cluster: Cluster, shape: Shape, *, stand_ins: bool = True) -> None:
        self.cluster, self.shape, self._stand_ins = cluster, shape, stand_ins

    def of(self, schedule: Schedule) -> list[Cost]:
        """One for each operation, in order."""
        views = {op.into for op in schedule.ops if isinstance(op, Load)}
        costs = [self._of(op, schedule, views) for op in schedule.ops]
        # The results of two tiles, and received rows one after the other, are accumulated in one launch.
        for index, number in accumulations(schedule, self.shape, aliases(schedule)).items():
            # Rows that are sent are summed into their message.
            if not (isinstance(schedule.ops[index], Start) and costs[index].touched):
                costs[index] = self._launching(costs[index], number)
        if self._stand_ins and schedule.backward:
            for index, rows in _stand_ins(schedule).items():
                made = self._stand_in(rows_bytes(schedule, self.shape, ("dout",), rows))
                costs[index] = self._launching(replace(costs[index], touched=costs[index].touched + made), 1)
        return costs

    def call_host_s(self, schedule: Schedule) -> float:
        """Host seconds of one attention call."""
        device = self.cluster.device
        return 1e-6 * (device.host_backward_us if schedule.backward else device.host_forward_us)

    def _of(self, op: Op, schedule: Schedule, views: Iterable[str]) -> Cost:
        match op:
            case Attend():
                return self._attend(op, schedule)
            case Assemble(into=into, sources=sources) if len(sources) > 1:
                return self._launching(Cost(touched=COPIED * self._bytes(schedule, into)), 1)
            case Fold(source=source):
                return Cost(touched=MERGED * self._bytes(schedule, source))
            case Store(sources=sources):
                # A sum may have more rows than the rank's own, which are all that is stored.
                payloads = (schedule.values[source].payload for source in sources)
                stored = sum(rows_bytes(schedule, self.shape, payload, CHUNKS_PER_RANK) for payload in payloads)
                return Cost(touched=COPIED * stored)
            case Start(move=move):
                sizes = [rows_bytes(schedule, self.shape, move.payload, len(m.chunks)) for m in move.sends]
                # A whole value that already is a buffer of its own is sent as it is.
                copied = [
                    size
                    for size, message in zip(sizes, move.sends, strict=True)
                    if message.value in views or len(message.chunks) < len(schedule.values[message.value].chunks)
                ]
                posted_s = 1e-6 * self.cluster.device.host_transfer_us
                moved = Cost(touched=COPIED * sum(copied), sends=tuple(sizes), host_s=posted_s)
                return self._launching(moved, 1 if copied else 0)
        return Cost()

    def _launching(self, cost: Cost, launches: int) -> Cost:
        """The cost with so many more launches. A list of copies, merges or sums of one operation is one launch."""
        device = self.cluster.device
        return replace(
            cost,
            launch_s=cost.launch_s + 1e-6 * launches * device.launch_us,
            host_s=cost.host_s + 1e-6 * launches * device.host_launch_us,
        )

    def _attend(self, op: Attend, schedule: Schedule) -> Cost:
        shape = self.shape
        kernel_s = self._kernels_s(op.tiles, schedule) + len(op.tiles) * self.cluster.device.call_us * 1e-6
        rows = sum(t.rows[1] - t.rows[0] for t in op.tiles)
        cols = sum(t.cols[1] - t.cols[0] for t in op.tiles)
        merged = rows_bytes(schedule, shape, ("dq",) if schedule.backward else ("out", "lse"), rows)
        if schedule.backward:
            merged += rows_bytes(schedule, shape, ("dk", "dv"), cols)
        return Cost(kernel_s, MERGED * merged, host_s=len(op.tiles) * self.call_host_s(schedule))

    def _kernels_s(self, tiles: tuple[Tile, ...], schedule: Schedule) -> float:
        """Seconds of the attention kernels of some tiles."""
        device, shape = self.cluster.device, self.shape
        chunk = shape.tokens / CHUNKS_PER_RANK
        heads = shape.q_heads / schedule.parts
        channels = (shape.head_dim + (shape.v_head_dim or shape.head_dim)) / 2
        if device.kernels is not None:
            each = chunk * chunk * shape.batch, heads, channels
            return sum(
                call_seconds(device.kernels, t.area * each[0], *each[1:], backward=schedule.backward, causal=t.causal)
                for t in tiles
            )
        flops, rate = (BACKWARD_FLOPS, device.backward) if schedule.backward else (FORWARD_FLOPS, device.forward)
        work = flops * sum(t.area for t in tiles) * chunk * chunk * heads * channels * shape.batch
        return work / (device.tflops * 1e12 * rate)

    def _stand_in(self, dout: float) -> float:
        """Bytes that making the stand-in for rows moves, given those of their dO."""
        if self.cluster.host is None:
            return COPIED * dout
        return STAND_IN * dout * self.shape.accumulate_itemsize / self.shape.itemsize

    def _bytes(self, schedule: Schedule, name: str) -> float:
        value = schedule.values[name]
        return rows_bytes(schedule, self.shape, value.payload, len(value.chunks))


def _stand_ins(schedule: Schedule) -> dict[int, int]:
    """Chunks of queries for which an operation of backward makes the stand-in: the first that attends with them."""
    first: dict[tuple[str, ...], int] = {}
    views = own_views(schedule)
    for index, op in enumerate(schedule.ops):
        # Own rows have their output.
        if isinstance(op, Attend) and not views.issuperset(op.q):
            first.setdefault(op.q, index)
    values = schedule.values
    return {
        index: sum(len(values[name].chunks) for name in names if "dout" in values[name].payload)
        for names, index in first.items()
    }
