"""Counters: words, messages and bytes, read off a schedule.

A *word* is one element of q, k, v, out, or of a gradient. The statistics lse and delta are one element
a head instead of one a channel; they are counted in bytes, and kept out of the words that the
literature compares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.ops import Schedule

#: Tensors that travel in the accumulation dtype; the others travel in the dtype of the inputs.
ACCUMULATED = frozenset({"out", "lse", "delta", "dq", "dk", "dv"})
STATISTICS = frozenset({"lse", "delta"})
KV_TENSORS = frozenset({"k", "v", "dk", "dv"})


@dataclass(frozen=True)
class Shape:
    """Sizes of one rank's shard in one attention layer.

    Attributes:
        tokens: n, tokens of a rank.
        q_heads, kv_heads: heads at hand (after tensor parallelism).
        head_dim: channels a head, of q and k; ``v_head_dim`` of v, the same unless given.
        batch: sequences.
        itemsize, accumulate_itemsize: bytes of an element as input and as accumulated.
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
        """kv heads / q heads."""
        return self.kv_heads / self.q_heads

    @property
    def unit(self) -> int:
        """Elements of one query shard, n*H: the unit of the bounds."""
        return self.elements("q")

    def elements(self, tensor: str) -> int:
        """Elements of one shard of a tensor named as in a payload."""
        return self.batch * self.tokens * self._widths[tensor]

    @cached_property
    def _widths(self) -> dict[str, int]:
        """Elements of a token, by tensor."""
        value_dim = self.v_head_dim or self.head_dim
        q, k, v = self.q_heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * value_dim
        out, lse = self.q_heads * value_dim, self.q_heads
        return {"q": q, "dq": q, "k": k, "dk": k, "v": v, "dv": v, "out": out, "dout": out, "lse": lse, "delta": lse}

    def bytes(self, tensor: str) -> int:
        """Bytes of one shard of a tensor, in the dtype in which it is sent and accumulated."""
        return self.elements(tensor) * self.itemsize_of(tensor)

    def itemsize_of(self, tensor: str) -> int:
        """Bytes of an element as it is sent and accumulated."""
        return self.accumulate_itemsize if tensor in ACCUMULATED else self.itemsize


def rows_elements(schedule: Schedule, shape: Shape, tensor: str, chunks: int) -> float:
    """Elements of some chunks of a tensor, for one part of the heads. kv heads that several parts share count in each.

    A whole number wherever the schedule can run.
    """
    return _elements(shape, schedule.parts, tensor, chunks)


def rows_bytes(schedule: Schedule, shape: Shape, payload: Sequence[str], chunks: int) -> float:
    """Bytes of some chunks of some tensors, for one part of the heads."""
    return _bytes(shape, schedule.parts, tuple(payload), chunks)


def _elements(shape: Shape, parts: int, tensor: str, chunks: int) -> float:
    if tensor in KV_TENSORS:
        parts = min(parts, shape.kv_heads)
    whole, rest = divmod(shape.elements(tensor) * chunks, CHUNKS_PER_RANK * parts)
    return whole + rest / (CHUNKS_PER_RANK * parts) if rest else whole


# A schedule has thousands of messages, of a few sizes.
@lru_cache(maxsize=1024)
def _bytes(shape: Shape, parts: int, payload: tuple[str, ...], chunks: int) -> float:
    return sum(_elements(shape, parts, tensor, chunks) * shape.itemsize_of(tensor) for tensor in payload)


def words(schedule: Schedule, shape: Shape) -> float:
    """Words a rank receives in one pass, statistics left out."""
    return sum(
        rows_elements(schedule, shape, tensor, len(message.chunks))
        for move in schedule.moves
        for message in move.receives
        for tensor in move.payload
        if tensor not in STATISTICS
    )


def messages(schedule: Schedule) -> int:
    """Messages a rank receives in one pass."""
    return sum(len(move.receives) for move in schedule.moves)


def received_bytes(schedule: Schedule, shape: Shape) -> Counter[tuple[str, str]]:
    """Bytes a rank receives in one pass, by (axis, tensor), statistics among them."""
    found: Counter[tuple[str, str]] = Counter()
    for move in schedule.moves:
        for message in move.receives:
            for tensor in move.payload:
                found[move.axis, tensor] += rows_bytes(schedule, shape, (tensor,), len(message.chunks))
    return found
