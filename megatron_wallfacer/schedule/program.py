"""A lowered schedule: every tensor is an operand with its place in memory, every operation a list of steps on operands.

A schedule says what one rank does on named chunks; a program says the same with sizes. Nothing is left to look up while
it runs. Both are plain data: the engine binds a program to a kernel and to process groups, and runs it.

"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.ops import Move, Op, Schedule
from megatron_wallfacer.schedule.volume import Shape

#: How a buffer is read: in the dtype of the inputs, in the accumulation dtype, as bytes, or in its own dtype.
View = Literal["input", "wide", "bytes", "own"]
WORKSPACE = "workspace"


class Operand(NamedTuple):
    """A strided tensor in a buffer; steps name it by its number.

    Attributes:
        buffer: ``workspace``, one of the rank's own tensors, a result, or a kept value, by name.
        view: dtype in which the buffer is read. Own tensors and results have a dtype of their own.
        shape, strides: in elements.
        offset: elements from the start of the buffer.
    """

    buffer: str
    view: View
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class KernelRows(NamedTuple):
    """Rows of a result of an attention call, which is held until they are accumulated.

    Attributes:
        slot: of the call's results.
        result: index among the results: (out, lse), or (dq, dk, dv).
        rows: half-open range; None for all.
    """

    slot: int
    result: int
    rows: tuple[int, int] | None


Source = int | KernelRows


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy rows: pack, put together, store. Pairs of (into, source)."""

    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Permute:
    """Copy blocks of equal size in another order: ``into[i] = source[index[i]]``, both ``[blocks, elements]``."""

    into: int
    source: int
    index: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fill:
    """Write rows that nothing is added to. Pairs of (operand, value)."""

    rows: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Merge:
    """Write partial outputs that are merged by log-sum-exp.

    Attributes:
        rows: (out, lse), and the (out, lse) of each part. Where the rows hold something, they are the first part.
        frees: slots of attention calls whose results nothing reads after this.
    """

    rows: tuple[tuple[tuple[int, int], tuple[tuple[Source, Source], ...]], ...]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Sum:
    """Write sums of gradients.

    Attributes:
        rows: (into, sources). Where the rows hold something, they are the first source.
        frees: slots of attention calls whose results nothing reads after this.
    """

    rows: tuple[tuple[int, tuple[Source, ...]], ...]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OutProxy:
    """Make a tensor that has the rowsum(dO * O) of the forward output (:func:`..engine.merge.out_proxy`)."""

    dout: int
    delta: int
    into: int


@dataclass(frozen=True, slots=True)
class AttendForward:
    """One kernel call; a slot holds its output and lse."""

    q: int
    k: int
    v: int
    tile: AttnTile
    slot: int


@dataclass(frozen=True, slots=True)
class AttendBackward:
    """One kernel call; a slot holds dq, dk and dv. ``out`` is the output or its proxy."""

    dout: int
    q: int
    k: int
    v: int
    out: int
    lse: int
    tile: AttnTile
    slot: int


@dataclass(frozen=True, slots=True)
class PostReceives:
    """Give the receives of a transfer their buffers before it starts. May be left out."""

    transfer: int


@dataclass(frozen=True, slots=True)
class SendReceive:
    """Start a transfer; does not block."""

    transfer: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until all that a transfer receives has arrived and all that it sends has left."""

    transfer: int


Step = (
    Copy | Permute | Fill | Merge | Sum | OutProxy | AttendForward | AttendBackward | PostReceives | SendReceive | Wait
)


class Packet(NamedTuple):
    """One end of a message: the peer's index in the context-parallel group, the operand of its bytes, its tag."""

    peer: int
    operand: int
    tag: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """Sends and receives that start together.

    Attributes:
        channel: (axis, ``inputs`` or ``results``), which names the process group.
        sends, receives: the messages.
        payload: names of the tensors in each message, for messages about it.
    """

    channel: tuple[str, str]
    sends: tuple[Packet, ...]
    receives: tuple[Packet, ...]
    payload: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Exchange:
    """A transfer as one all-to-all: every rank of a group sends each, itself too, a part of equal size.

    Attributes:
        channel: names the process group, as that of a transfer.
        ranks: the group's ranks in its order, by their indices in the context-parallel group.
        send, receive: operands of the bytes of all parts, side by side in the order of ranks.
        payload: names of the tensors in each part.
    """

    channel: tuple[str, str]
    ranks: tuple[int, ...]
    send: int
    receive: int
    payload: tuple[str, ...] = ()


class Result(NamedTuple):
    """A tensor that the pass gives to its caller."""

    name: str
    shape: tuple[int, ...]
    wide: bool


@dataclass(frozen=True, eq=False)
class Program:
    """One pass of one rank with all sizes.

    Attributes:
        schedule: what it was lowered from.
        shape: sizes of the rank's shard.
        inputs: names of the rank's own tensors.
        given: names of the kept values that backward reads, each a buffer of bytes.
        results: tensors that are given to the caller.
        kept: name and bytes of each value that is kept for backward.
        workspace_bytes: size of the one buffer that holds everything else.
        operands: what the steps name by number.
        slots: attention calls whose results are held at the same time, at most.
        transfers: what the steps name by number.
        steps: by operation of the schedule, or by the move that is waited for.
        received: bytes received by (axis, tensor).
    """

    schedule: Schedule
    shape: Shape
    inputs: tuple[str, ...]
    given: tuple[str, ...]
    results: tuple[Result, ...]
    kept: tuple[tuple[str, int], ...]
    workspace_bytes: int
    operands: tuple[Operand, ...]
    slots: int
    transfers: tuple[Transfer | Exchange, ...]
    steps: tuple[tuple[Op | Move, tuple[Step, ...]], ...]
    received: Mapping[tuple[str, str], int]
