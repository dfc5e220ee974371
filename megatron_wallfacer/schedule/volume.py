"""Counters of a schedule: elements, messages and bytes that a rank receives.

The communication volume counts elements of q, k, v, out and gradients. As in the literature, the volume ignores the
statistics lse and delta, which have one element per head instead of one per channel. Counters of bytes include lse and
delta.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.ops import ACCUMULATED, KV_TENSORS, STATISTICS, Schedule


@dataclass(frozen=True)
class Shape:
    """Sizes of the shard of one rank in one attention layer.

    Attributes:
        tokens: n, tokens per rank.
        q_heads: query heads per rank after tensor parallelism.
        kv_heads: key and value heads per rank after tensor parallelism.
        head_dim: channels per query or key head.
        v_head_dim: channels per value head; ``head_dim`` unless given.
        batch: sequences per micro-batch.
        itemsize: bytes of an element of the inputs.
        accumulate_itemsize: bytes of an element of partial results and gradients.
    """

    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    batch: int = 1
    itemsize: int = 2
    accumulate_itemsize: int = 4

    @property
    def kappa(self) -> float:
        """Return the ratio kv heads / query heads."""
        return self.kv_heads / self.q_heads

    @property
    def unit(self) -> int:
        """Return the unit of communication volume: the number of elements of one query shard."""
        return self.elements("q")

    def elements(self, tensor: str) -> int:
        """Return the number of elements of one shard of a tensor."""
        return self.batch * self.tokens * self._widths[tensor]

    @cached_property
    def _widths(self) -> dict[str, int]:
        value_dim = self.v_head_dim or self.head_dim
        q, k, v = self.q_heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * value_dim
        out, lse = self.q_heads * value_dim, self.q_heads
        return {"q": q, "dq": q, "k": k, "dk": k, "v": v, "dv": v, "out": out, "dout": out, "lse": lse, "delta": lse}

    def bytes(self, tensor: str) -> int:
        """Return the bytes of one shard of a tensor, in the dtype of messages and accumulators."""
        return self.elements(tensor) * self.itemsize_of(tensor)

    def itemsize_of(self, tensor: str) -> int:
        """Return the number of bytes per element of a tensor in messages and accumulators."""
        return self.accumulate_itemsize if tensor in ACCUMULATED else self.itemsize


def rows_elements(schedule: Schedule, shape: Shape, tensor: str, chunks: int) -> float:
    """Return the elements of some chunks of a tensor for one head slice.

    A kv head that several slices share counts in each of the slices. The returned number is an integer for
    every schedule that can run.
    """
    return _elements(shape, schedule.head_slices, tensor, chunks)


def rows_bytes(schedule: Schedule, shape: Shape, payload: Sequence[str], chunks: int) -> float:
    """Return the bytes of some chunks of some tensors for one head slice."""
    return _bytes(shape, schedule.head_slices, tuple(payload), chunks)


def value_bytes(schedule: Schedule, shape: Shape, name: str) -> int:
    """Return the size of a value in bytes."""
    value = schedule.values[name]
    return int(rows_bytes(schedule, shape, value.payload, len(value.chunks)))


def _elements(shape: Shape, head_slices: int, tensor: str, chunks: int) -> float:
    if tensor in KV_TENSORS:
        head_slices = min(head_slices, shape.kv_heads)
    whole, rest = divmod(shape.elements(tensor) * chunks, CHUNKS_PER_RANK * head_slices)
    return whole + rest / (CHUNKS_PER_RANK * head_slices) if rest else whole


# Cached, because a schedule has thousands of messages of a few sizes.
@lru_cache(maxsize=1024)
def _bytes(shape: Shape, head_slices: int, payload: tuple[str, ...], chunks: int) -> float:
    return sum(_elements(shape, head_slices, tensor, chunks) * shape.itemsize_of(tensor) for tensor in payload)


def received_elements(schedule: Schedule, shape: Shape) -> float:
    """Return the number of elements that a rank receives in one pass, without softmax statistics."""
    return sum(
        rows_elements(schedule, shape, tensor, len(message.chunks))
        for transfer in schedule.transfers
        for message in transfer.receives
        for tensor in transfer.payload
        if tensor not in STATISTICS
    )


def messages(schedule: Schedule) -> int:
    """Return the number of messages that a rank receives in one pass."""
    return sum(len(transfer.receives) for transfer in schedule.transfers)


def received_bytes(schedule: Schedule, shape: Shape) -> Counter[tuple[str, str]]:
    """Return the bytes that a rank receives in one pass, with softmax statistics, by (axis, tensor)."""
    found: Counter[tuple[str, str]] = Counter()
    for transfer in schedule.transfers:
        for message in transfer.receives:
            for tensor in transfer.payload:
                found[transfer.axis, tensor] += rows_bytes(schedule, shape, (tensor,), len(message.chunks))
    return found
