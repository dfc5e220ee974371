"""What can move between ranks, as plain data.

A payload names tensors: ``q k v dout`` as the model sees them, ``out lse delta`` statistics and partial
results of softmax, ``dq dk dv`` gradients. Ranks are indices in the context-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass

Q, KV = ("q",), ("k", "v")
PARTIAL_OUT = ("out", "lse")
#: What a rank needs of a query block to compute gradients against any key block.
Q_BACKWARD = ("q", "dout", "lse", "delta")
DQ, DKV = ("dq",), ("dk", "dv")


@dataclass(frozen=True)
class Gather:
    """All-gather one shard of each payload tensor from ``ranks``; the result is their block."""

    axis: str
    payload: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Combine:
    """Lse-weighted reduce-scatter of partial outputs: each rank ends with its own shard, final."""

    axis: str
    ranks: tuple[int, ...]
    payload: tuple[str, ...] = PARTIAL_OUT


@dataclass(frozen=True)
class Reduce:
    """Reduce-scatter (sum) of gradients of the block of ``ranks``: each ends with its own shard."""

    axis: str
    payload: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Hop:
    """Point-to-point: send a block to one rank while the next one arrives from another.

    ``axis`` says over which groups it travels: ``ring``, or ``cp`` for jumps across the whole group.
    ``shards`` is the size of the block.
    """

    axis: str
    payload: tuple[str, ...]
    send_to: int
    recv_from: int
    shards: int


Move = Gather | Combine | Reduce | Hop
