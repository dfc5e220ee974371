"""The operations of a schedule. Each rank starts the operations of its own schedule one after another.

An operation refers to values by their names. A *value* is a group of tensors with the rows of some chunks and the heads
of one head slice. The rows are sorted by position. Tensors are named ``q k v dout`` as in the model, ``out lse delta``
for partial results and statistics of softmax, ``dq dk dv`` for gradients. Ranks are indices in the context-parallel
group.

An operation waits only for the values that it reads. If a value arrives in a transfer, the operation waits until the
whole transfer has ended: all its messages have arrived or left. A value lives from the first operation that names it to
the last operation that reads it, or to the end of the last transfer that sends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from megatron_wallfacer.schedule.tiles import Tile

Q, KV = ("q",), ("k", "v")
PARTIAL_OUT = ("out", "lse")
#: Tensors of a query block besides q that gradients against any key block depend on.
DOUT = ("dout", "lse", "delta")
DQ, DKV = ("dq",), ("dk", "dv")
#: Tensors that are sent together, by the name of the tensor group.
TENSORS = {"q": Q, "kv": KV, "dout": DOUT}
#: Tensors that are summed or merged. All other tensors are inputs.
RESULTS = frozenset({"out", "dq", "dk", "dv"})
#: Tensors that are sent in the accumulation dtype. All other tensors are sent in the dtype of the inputs.
ACCUMULATED = frozenset({"out", "lse", "delta", "dq", "dk", "dv"})
STATISTICS = frozenset({"lse", "delta"})
KV_TENSORS = frozenset({"k", "v", "dk", "dv"})


class RowSet(NamedTuple):
    """Rows of one operand at one rank.

    Attributes:
        kind: ``local`` (the rank's own shard), ``gathered`` (shards of the other ranks of its team), ``team`` (both in
            one block), or ``step`` (the block that arrives for a ring step).
        step: number of the ring step if ``kind`` is ``step``, else 0.
    """

    kind: Literal["local", "gathered", "team", "step"]
    step: int = 0

    def __str__(self) -> str:
        return f"step{self.step}" if self.kind == "step" else self.kind


LOCAL, GATHERED, TEAM = RowSet("local"), RowSet("gathered"), RowSet("team")


def received(step: int) -> RowSet:
    """Return the row set of the block that a ring step receives."""
    return RowSet("step", step)


@dataclass(frozen=True, slots=True)
class Value:
    """Rows of some tensors, which an operation reads or writes.

    Attributes:
        chunks: chunk ids of the rows, ascending.
        rows: row set for operands of attention; None for all other values.
    """

    payload: tuple[str, ...]
    chunks: tuple[int, ...]
    head_slice: int
    rows: RowSet | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Message:
    """One end of a message.

    Attributes:
        peer: rank of the other end.
        value: name of the value that is sent, or that the message creates at its receiver.
        chunks: ids of the chunks in the message.
        tag: number that is equal at both ends, and unique among the messages of one pass between two ranks.
    """

    peer: int
    value: str
    chunks: tuple[int, ...]
    tag: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """Sends and receives that start together, unless `PostRecv` posts the receives earlier.

    Attributes:
        axis: grid axis of the messages; ``cp`` for messages along no axis.
        payload: names of the tensors in each message.
    """

    axis: str
    payload: tuple[str, ...]
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]

    @property
    def channel(self) -> tuple[str, str]:
        """Return the grid axis, and ``inputs`` or ``results``. NCCL runs transfers of one channel in succession."""
        return self.axis, "results" if RESULTS.intersection(self.payload) else "inputs"


@dataclass(frozen=True, slots=True)
class View:
    """Define a value as a view of some heads of the rank's local tensors, without a copy."""

    into: str


@dataclass(frozen=True, slots=True)
class Concat:
    """Concatenate rows of the same tensors and head slice. Rows of the result are sorted by position."""

    into: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PostRecv:
    """Post the receives of a transfer before its start, so that senders need not wait. Backends may ignore this."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class SendRecv:
    """Start a transfer without blocking. No later operation may change the rows that the transfer sends."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Attend:
    """Compute attention of query rows against key rows, tile by tile.

    Attributes:
        q: names of the values with the tensors of the query block. All of these values have the same rows.
        kv: names of the values with the tensors of the key block. All of these values have the same rows.
        q_into: accumulator for the query block: the partial output (out, lse) in forward, dq in backward. The
            accumulator may have more rows than the query block.
        kv_into: accumulator of dk and dv in backward, None in forward; may have more rows than the key block.
    """

    q: tuple[str, ...]
    kv: tuple[str, ...]
    q_into: str
    kv_into: str | None
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class Accumulate:
    """Merge a partial output into an accumulator, or add a gradient, for the rows that source and accumulator share."""

    source: str
    into: str


@dataclass(frozen=True, slots=True)
class WriteResult:
    """Write local rows into the results of the pass, and sum gradients of kv heads that several head slices share."""

    sources: tuple[str, ...]


Op = View | Concat | PostRecv | SendRecv | Attend | Accumulate | WriteResult


@dataclass(frozen=True)
class Schedule:
    """The operations of one rank in one pass.

    Attributes:
        rank: index in the context-parallel group.
        cp_size: P, the number of context-parallel ranks.
        head_slices: number of head slices over all ranks and head groups.
        values: map from name to :class:`Value`.
        given: names of the values that forward kept and backward reads.
        keeps: names of the values that forward keeps for backward, sorted.
    """

    rank: int
    cp_size: int
    head_slices: int
    backward: bool
    values: Mapping[str, Value] = field(hash=False)
    ops: tuple[Op, ...]
    given: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """Return all transfers in the order in which they start."""
        return tuple(op.transfer for op in self.ops if isinstance(op, SendRecv))

    @property
    def attends(self) -> tuple[Attend, ...]:
        """Return all attention operations in order."""
        return tuple(op for op in self.ops if isinstance(op, Attend))

    @cached_property
    def last_mentions(self) -> Mapping[str, int]:
        """Return, for each value, the index of the last operation that reads or writes it, or ``len(ops)`` if kept."""
        last = {name: index for index, op in enumerate(self.ops) for name in (*reads(op), *writes(op))}
        return last | dict.fromkeys(self.keeps, len(self.ops))


def reads(op: Op) -> tuple[str, ...]:
    """Return the names of the values that an operation reads."""
    match op:
        case Concat(sources=sources) | WriteResult(sources=sources):
            return sources
        case SendRecv(transfer=transfer):
            return tuple(message.value for message in transfer.sends)
        case Attend():
            return (*op.q, *op.kv)
        case Accumulate(source=source):
            return (source,)
    return ()


def writes(op: Op) -> tuple[str, ...]:
    """Return the names of the values that an operation creates or changes."""
    match op:
        case View(into=into) | Concat(into=into) | Accumulate(into=into):
            return (into,)
        case SendRecv(transfer=transfer) | PostRecv(transfer=transfer):
            return tuple(message.value for message in transfer.receives)
        case Attend(q_into=q_into, kv_into=kv_into):
            return (q_into,) if kv_into is None else (q_into, kv_into)
    return ()


def is_last_accumulate(schedule: Schedule, index: int) -> bool:
    """Return whether operation number ``index`` is the last of consecutive :class:`Accumulate` operations."""
    return isinstance(schedule.ops[index], Accumulate) and not any(
        isinstance(op, Accumulate) for op in schedule.ops[index + 1 : index + 2]
    )
