"""What a schedule is made of: operations of one rank on named values, in the order in which they are begun.

A *value* is a block: some chunks of the sequence of some tensors, for one part of the heads. Tensors are named ``q k v
dout`` as the model sees them, ``out lse delta`` for partial results and statistics of softmax, ``dq dk dv`` for
gradients. Rows of a value are sorted by position. Ranks are indices in the context-parallel group.

Nothing waits but for what it reads. An operation that reads a value which a move brings waits for that whole move:
until all it brings has arrived and all it sends has left. A value lives from the operation that first names it to
the last that reads it; if a move sends it, to where that move is waited for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from megatron_wallfacer.schedule.tiles import Tile

Q, KV = ("q",), ("k", "v")
PARTIAL_OUT = ("out", "lse")
#: What a rank needs of a query block, besides q, to compute gradients against any key block.
DOUT = ("dout", "lse", "delta")
DQ, DKV = ("dq",), ("dk", "dv")
#: Tensors that are summed or merged; all others are inputs.
RESULTS = frozenset({"out", "dq", "dk", "dv"})


@dataclass(frozen=True, slots=True)
class Value:
    """What a name stands for.

    Attributes:
        payload: its tensors.
        chunks: its rows, ascending.
        part: which of the parts of the heads.
    """

    payload: tuple[str, ...]
    chunks: tuple[int, ...]
    part: int


@dataclass(frozen=True, slots=True)
class Message:
    """One end of a message.

    Attributes:
        peer: the other end.
        value: what is sent, or what comes to life by the arrival.
        chunks: rows of it that are sent; of an arrival, all.
        tag: the same at both ends, different for messages of one pass between the same two ranks.
    """

    peer: int
    value: str
    chunks: tuple[int, ...]
    tag: int


@dataclass(frozen=True, slots=True)
class Move:
    """Messages that are begun together.

    Attributes:
        axis: the axis along which they go; ``cp`` if along none.
        payload: the tensors of each message.
        sends, receives: what leaves, what arrives.
    """

    axis: str
    payload: tuple[str, ...]
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]

    @property
    def channel(self) -> tuple[str, str]:
        """Moves of one channel may wait for each other: (axis, inputs or results)."""
        return self.axis, "results" if RESULTS.intersection(self.payload) else "inputs"


@dataclass(frozen=True, slots=True)
class Load:
    """Name some heads of the rank's own tensors."""

    into: str


@dataclass(frozen=True, slots=True)
class Assemble:
    """One value out of several of the same tensors and heads, rows sorted by position."""

    into: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Expect:
    """Give a move's receives their buffers before it starts: a message then finds where to go. May be ignored."""

    move: Move


@dataclass(frozen=True, slots=True)
class Start:
    """Begin a move. What it sends may no longer change."""

    move: Move


@dataclass(frozen=True, slots=True)
class Attend:
    """Kernel calls: query rows against key rows.

    Attributes:
        q, kv: values that have the tensors of each side between them; each side's values have the same rows.
        q_into: forward, the partial output (out, lse) that is merged into; backward, the dq that is added to. It has
            all query rows, and may have more.
        kv_into: backward, the (dk, dv) that are added to; it has all key rows, and may have more.
        tiles: rows and columns in chunks of the two sides.
    """

    q: tuple[str, ...]
    kv: tuple[str, ...]
    q_into: str
    kv_into: str | None
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """Merge a partial output, or add a gradient, into another: the rows that both have."""

    source: str
    into: str


@dataclass(frozen=True, slots=True)
class Store:
    """Put the rank's own chunks of finished values into its results; kv heads that several parts share are summed."""

    sources: tuple[str, ...]


Op = Load | Assemble | Expect | Start | Attend | Fold | Store


@dataclass(frozen=True)
class Schedule:
    """The program of one rank for one pass.

    Attributes:
        rank: index in the context-parallel group.
        cp_size: P.
        parts: parts into which the heads are cut, over all ranks and groups.
        backward: this is the gradient pass.
        values: what each name stands for.
        ops: in the order in which they are begun.
        given: names that have a value before the first operation: what forward keeps, in its order.
        keeps: names that keep their value for backward, in the order of their names.
    """

    rank: int
    cp_size: int
    parts: int
    backward: bool
    values: Mapping[str, Value] = field(hash=False)
    ops: tuple[Op, ...]
    given: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()

    @property
    def moves(self) -> tuple[Move, ...]:
        """Every move, in the order in which they start."""
        return tuple(op.move for op in self.ops if isinstance(op, Start))

    @property
    def attends(self) -> tuple[Attend, ...]:
        """Every group of kernel calls, in order."""
        return tuple(op for op in self.ops if isinstance(op, Attend))

    @cached_property
    def last_mentions(self) -> Mapping[str, int]:
        """The last operation that names each value; one that is kept for backward outlives them all."""
        last = {name: index for index, op in enumerate(self.ops) for name in (*reads(op), *writes(op))}
        return last | dict.fromkeys(self.keeps, len(self.ops))

    @cached_property
    def drops(self) -> Mapping[int, tuple[str, ...]]:
        """By operation, the values that no later one names."""
        found: dict[int, tuple[str, ...]] = {}
        for name, index in self.last_mentions.items():
            found[index] = (*found.get(index, ()), name)
        return found

    @cached_property
    def last_copies(self) -> Mapping[str, Op]:
        """The last move that sends each view of the rank's own tensors: with it the copy that is sent is let go of."""
        views = {op.into for op in self.ops if isinstance(op, Load)}
        starts = [op for op in self.ops if isinstance(op, Start)]
        return {message.value: op for op in starts for message in op.move.sends if message.value in views}


def reads(op: Op) -> tuple[str, ...]:
    """Names whose values an operation needs."""
    match op:
        case Assemble(sources=sources) | Store(sources=sources):
            return sources
        case Start(move=move):
            return tuple(message.value for message in move.sends)
        case Attend():
            return (*op.q, *op.kv)
        case Fold(source=source):
            return (source,)
    return ()


def writes(op: Op) -> tuple[str, ...]:
    """Names that an operation gives a value, or changes the value of."""
    match op:
        case Load(into=into) | Assemble(into=into) | Fold(into=into):
            return (into,)
        case Start(move=move) | Expect(move=move):
            return tuple(message.value for message in move.receives)
        case Attend(q_into=q_into, kv_into=kv_into):
            return (q_into,) if kv_into is None else (q_into, kv_into)
    return ()


def is_last_fold(schedule: Schedule, index: int) -> bool:
    """Return whether an operation ends a run of folds, all of which are added in one launch."""
    return isinstance(schedule.ops[index], Fold) and not any(
        isinstance(op, Fold) for op in schedule.ops[index + 1 : index + 2]
    )
