"""What the operations of a schedule take on a device, communication apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.memory import own_views
from megatron_wallfacer.schedule.ops import Assemble, Attend, Fold, Load, Op, Schedule, Start, Store
from megatron_wallfacer.schedule.volume import Shape, rows_bytes

#: Products of two operations each for a live (query, key, channel): two forward, five backward.
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10
#: Times that a byte of a result crosses memory: merged (part and sum read, sum written), copied (read, written).
MERGED, COPIED = 3, 2
#: And a byte of a stand-in for the output (engine.merge.out_proxy) where PyTorch's operators make it, as on a
#: CPU: five that read and write, or write a number a row. A GPU's kernel reads dO and writes the stand-in.
STAND_IN = 10


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one operation.

    Attributes:
        kernel_s: seconds of attention kernels.
        touched: bytes that merging and copying move through memory.
        sends: bytes of each message that it starts.
    """

    kernel_s: float = 0.0
    touched: float = 0.0
    sends: tuple[float, ...] = ()


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
        if self._stand_ins and schedule.backward:
            for index, rows in _stand_ins(schedule).items():
                made = self._stand_in(rows_bytes(schedule, self.shape, ("dout",), rows))
                costs[index] = replace(costs[index], touched=costs[index].touched + made)
        return costs

    def _of(self, op: Op, schedule: Schedule, views: Iterable[str]) -> Cost:
        match op:
            case Attend():
                return self._attend(op, schedule)
            case Assemble(into=into, sources=sources) if len(sources) > 1:
                return Cost(touched=COPIED * self._bytes(schedule, into))
            case Fold(source=source):
                return Cost(touched=MERGED * self._bytes(schedule, source))
            case Store(sources=sources):
                return Cost(touched=COPIED * sum(self._bytes(schedule, source) for source in sources))
            case Start(move=move):
                sizes = [rows_bytes(schedule, self.shape, move.payload, len(m.chunks)) for m in move.sends]
                # A whole value that already is a buffer of its own is sent as it is.
                copied = (
                    size
                    for size, message in zip(sizes, move.sends, strict=True)
                    if message.value in views or len(message.chunks) < len(schedule.values[message.value].chunks)
                )
                return Cost(touched=COPIED * sum(copied), sends=tuple(sizes))
        return Cost()

    def _attend(self, op: Attend, schedule: Schedule) -> Cost:
        device, shape = self.cluster.device, self.shape
        flops, rate = (BACKWARD_FLOPS, device.backward) if schedule.backward else (FORWARD_FLOPS, device.forward)
        chunk = shape.tokens / CHUNKS_PER_RANK
        heads = shape.q_heads / schedule.parts
        channels = (shape.head_dim + (shape.v_head_dim or shape.head_dim)) / 2
        pairs = sum((t.rows[1] - t.rows[0]) * (t.cols[1] - t.cols[0]) * (0.5 if t.causal else 1.0) for t in op.tiles)
        work = flops * pairs * chunk * chunk * heads * channels * shape.batch
        kernel_s = work / (device.tflops * 1e12 * rate) + len(op.tiles) * device.call_us * 1e-6
        rows = sum(t.rows[1] - t.rows[0] for t in op.tiles)
        cols = sum(t.cols[1] - t.cols[0] for t in op.tiles)
        merged = rows_bytes(schedule, shape, ("dq",) if schedule.backward else ("out", "lse"), rows)
        if schedule.backward:
            merged += rows_bytes(schedule, shape, ("dk", "dv"), cols)
        return Cost(kernel_s, MERGED * merged)

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
