"""A lowered schedule, in which each tensor is an operand with a memory offset, and each operation is a list of steps.

A schedule names chunks, and a program has sizes and memory offsets of operands. Schedules and programs are plain data.
The engine binds a program to a kernel and to process groups, and runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.ops import Op, Schedule, Transfer
from megatron_wallfacer.schedule.volume import Shape

#: Dtype in which a buffer is read: the dtype of the inputs, the accumulation dtype, bytes, or the buffer's own dtype.
DtypeView = Literal["input", "wide", "bytes", "own"]
WORKSPACE = "workspace"


class Operand(NamedTuple):
    """A strided tensor in a buffer. Steps refer to operands by number.

    Attributes:
        buffer: ``workspace``, or the name of a local tensor, a result, or a kept value.
        view: dtype in which the buffer is read. ``own`` is the dtype of a local tensor or a result.
        shape: number of elements along each dimension.
        strides: strides in elements.
        offset: offset from the start of the buffer, in elements.
    """

    buffer: str
    view: DtypeView
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class KernelRows(NamedTuple):
    """Rows of a result of an attention call. The result stays in a slot until the rows are accumulated.

    Attributes:
        slot: slot with the results of the call.
        result: index among the results, which are (out, lse) in forward and (dq, dk, dv) in backward.
        rows: half-open range of rows; None for all rows.
    """

    slot: int
    result: int
    rows: tuple[int, int] | None


Source = int | KernelRows


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the source of each (destination, source) pair of operands to the destination."""

    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Permute:
    """Copy blocks of equal size in another order: ``into[i] = source[index[i]]``, both ``[blocks, elements]``."""

    into: int
    source: int
    index: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fill:
    """Fill operands with constants. ``rows`` are pairs (index of the operand, constant)."""

    rows: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Merge:
    """Merge partial outputs by log-sum-exp.

    Attributes:
        rows: merges. A merge is a pair: the (out, lse) to write, and the partial results (out, lse) to merge. If the
            merge includes earlier contents of the first (out, lse), that (out, lse) is also the first partial result.
        frees: slots whose results no later step reads.
    """

    rows: tuple[tuple[tuple[int, int], tuple[tuple[Source, Source], ...]], ...]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Sum:
    """Sum gradients of several sources.

    Attributes:
        rows: sums, as pairs of an operand to write and the sources to add. If the sum includes earlier contents of the
            operand, the first source is the operand itself.
        frees: slots whose results no later step reads.
    """

    rows: tuple[tuple[int, tuple[Source, ...]], ...]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OutProxy:
    """Compute ``out_proxy``, a tensor with rowsum(dO * out_proxy) = rowsum(dO * O)."""

    dout: int
    delta: int
    into: int


@dataclass(frozen=True, slots=True)
class AttendForward:
    """Call the kernel's forward on one tile, and store ``out`` and ``lse`` in a slot."""

    q: int
    k: int
    v: int
    tile: AttnTile
    slot: int


@dataclass(frozen=True, slots=True)
class AttendBackward:
    """Call the kernel's backward on one tile, and store dq, dk and dv in a slot. ``out`` may be O or ``out_proxy``."""

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
    """Post the receives of a transfer before it starts. The engine may ignore this step."""

    transfer: int


@dataclass(frozen=True, slots=True)
class SendReceive:
    """Start a transfer without blocking."""

    transfer: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until all receives of a transfer have arrived and all its sends have left."""

    transfer: int


ProgramStep = (
    Copy | Permute | Fill | Merge | Sum | OutProxy | AttendForward | AttendBackward | PostReceives | SendReceive | Wait
)


class MessageBuffer(NamedTuple):
    """One end of a message.

    Attributes:
        peer: rank of the other end, in the context-parallel group.
        operand: index of the operand with the bytes of the message.
        tag: number that is equal at both ends.
    """

    peer: int
    operand: int
    tag: int


@dataclass(frozen=True, slots=True)
class PointToPoint:
    """A transfer that consists of separate sends and receives.

    Attributes:
        channel: key of the process group, a pair: the grid axis or ``cp``, and ``inputs`` or ``results``.
        payload: names of the tensors in each message, for error messages.
    """

    channel: tuple[str, str]
    sends: tuple[MessageBuffer, ...]
    receives: tuple[MessageBuffer, ...]
    payload: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AllToAll:
    """A transfer as one all-to-all collective: equal-sized messages from every rank to every rank.

    Attributes:
        channel: key of the process group, a pair: the grid axis, and ``inputs`` or ``results``.
        ranks: members of the process group, in group order, as indices in the context-parallel group.
        send: index of the operand with the bytes of all sent messages, one per rank, in the order of ``ranks``.
        receive: index of the operand with the bytes of all received messages, one per rank, in the order of ``ranks``.
    """

    channel: tuple[str, str]
    ranks: tuple[int, ...]
    send: int
    receive: int
    payload: tuple[str, ...] = ()


class Result(NamedTuple):
    """A tensor that a pass returns."""

    name: str
    shape: tuple[int, ...]
    wide: bool


@dataclass(frozen=True, eq=False)
class Program:
    """One pass of one rank, with sizes and offsets.

    Attributes:
        given: names of the buffers that forward has kept and backward reads.
        kept: name and bytes of each value that is kept for backward.
        workspace_bytes: bytes of the workspace.
        slots: largest number of attention calls with pending results at the same time.
        steps: (operation, steps of the operation) or (transfer, steps that wait for the transfer), in order.
        received: bytes that a run receives, by (axis, tensor).
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
    transfers: tuple[PointToPoint | AllToAll, ...]
    steps: tuple[tuple[Op | Transfer, tuple[ProgramStep, ...]], ...]
    received: Mapping[tuple[str, str], int]

    @property
    def buffers(self) -> tuple[str, ...]:
        """Return the distinct names of all buffers, in the order in which the engine numbers buffers."""
        results = (result.name for result in self.results)
        return (*self.inputs, *self.given, *results, *(name for name, _ in self.kept), WORKSPACE)
