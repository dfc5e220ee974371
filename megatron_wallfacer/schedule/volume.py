"""Counters: words, messages, bytes and buffers, read off a schedule.

A *word* is one element of q, k, v, out, or of a gradient. The statistics lse and delta are one element
a head instead of one a channel; they are counted in bytes, and kept out of the words that the
literature compares.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_wallfacer.schedule.moves import DKV, DQ, KV, PARTIAL_OUT, Q_BACKWARD, Hop, Move, Q
from megatron_wallfacer.schedule.plan import Rider
from megatron_wallfacer.schedule.schedule import Schedule

#: Tensors that travel in the accumulation dtype; the others travel in the dtype of the inputs.
ACCUMULATED = frozenset({"out", "lse", "delta", "dq", "dk", "dv"})
STATISTICS = frozenset({"lse", "delta"})


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
        value_dim = self.v_head_dim or self.head_dim
        width = {
            "q": self.q_heads * self.head_dim,
            "k": self.kv_heads * self.head_dim,
            "v": self.kv_heads * value_dim,
            "out": self.q_heads * value_dim,
            "lse": self.q_heads,
        }
        alias = {"dq": "q", "dk": "k", "dv": "v", "dout": "out", "delta": "lse"}
        return self.batch * self.tokens * width[alias.get(tensor, tensor)]

    def bytes(self, tensor: str) -> int:
        """Bytes of one shard of a tensor, in the dtype in which it is sent and accumulated."""
        return self.elements(tensor) * (self.accumulate_itemsize if tensor in ACCUMULATED else self.itemsize)


def shards_received(move: Move) -> int:
    """Shards of each payload tensor that a rank receives in one move."""
    return move.shards if isinstance(move, Hop) else len(move.ranks) - 1


def words(schedule: Schedule, shape: Shape) -> int:
    """Words a rank receives in one pass, statistics left out."""
    return sum(
        shards_received(move) * shape.elements(tensor)
        for move in schedule.moves
        for tensor in move.payload
        if tensor not in STATISTICS
    )


def busiest_rank(cp_size: int) -> int:
    """A rank that receives as much as any. All do, but that the published permutation leaves rank 0 its block."""
    return 1 % cp_size


def received_bytes(schedule: Schedule, shape: Shape) -> Counter[tuple[str, str]]:
    """Bytes a rank receives in one pass, by (axis, tensor), statistics among them."""
    return sum((move_bytes(move, shape) for move in schedule.moves), Counter())


def move_bytes(move: Move, shape: Shape) -> Counter[tuple[str, str]]:
    """Bytes a rank receives in one move, by (axis, tensor)."""
    shards = shards_received(move)
    return Counter({(move.axis, tensor): shards * shape.bytes(tensor) for tensor in move.payload})


def buffer_bytes(schedule: Schedule, shape: Shape) -> int:
    """Bytes that the turn of the ring holds at once, beyond the shards that a rank owns.

    Counted: the resident block if it was gathered, and its accumulators; the rider's block (one in use, one arriving);
    in backward the rider's gradient (one in use, one arriving, one that is leaving, one that waits at home), and
    the stand-in for the output of each query block. Not counted: a kernel's own workspace, and what the gathers
    and reductions hold before and after the turn.
    """
    inputs, results = _tensors(schedule)
    rider, step, turns = schedule.rider, schedule.steps[0], len(schedule.steps)
    resident: Rider = "q" if rider == "kv" else "kv"
    shards = {"q": len(step.q_ranks), "kv": len(step.kv_ranks)}
    copies = {resident: min(1, shards[resident] - 1), rider: min(2, turns - 1 + (shards[rider] > 1))}
    sums = {resident: 1, rider: _travelling(schedule)}
    stand_in = shape.bytes("dout") if schedule.backward else 0
    return shards["q"] * stand_in + sum(
        shards[side] * (copies[side] * _bytes(shape, inputs[side]) + sums[side] * _bytes(shape, results[side]))
        for side in ("q", "kv")
    )


def _travelling(schedule: Schedule) -> int:
    """Copies of the rider's gradient at once: what is summed now, a pair on the way, and what waits at home."""
    ways = [*(step.grad_hop for step in schedule.steps), *schedule.epilogue]
    leaves = any(isinstance(way, Hop) for way in ways)
    sums_meanwhile = any(step.grad_hop for step in schedule.steps)
    waits = schedule.keeps_first and leaves
    return max(1, 2 * leaves + sums_meanwhile + waits)


def _tensors(schedule: Schedule) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Tensors read and tensors accumulated, by side."""
    if schedule.backward:
        return {"q": Q_BACKWARD, "kv": KV}, {"q": DQ, "kv": DKV}
    return {"q": Q, "kv": KV}, {"q": PARTIAL_OUT, "kv": ()}


def _bytes(shape: Shape, tensors: tuple[str, ...]) -> int:
    return sum(shape.bytes(tensor) for tensor in tensors)
