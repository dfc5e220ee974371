"""Convert the steps of a program to Python functions, for a kernel and process groups. Each pass calls the functions.

Each function has two parameters. The first is the list of all tensors of a pass
(:class:`megatron_wallfacer.engine.memory.Memory`). The second is a list with the ``torch.distributed.Work`` objects of
each transfer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_wallfacer.engine.groups import CPU
from megatron_wallfacer.engine.memory import Memory
from megatron_wallfacer.engine.merge import merge_rows, out_proxy, sum_rows
from megatron_wallfacer.engine.row_lists import RowStep, row_list
from megatron_wallfacer.engine.transfers import Action, BoundTransfer
from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel
from megatron_wallfacer.schedule import program
from megatron_wallfacer.schedule.program import AllToAll, PointToPoint, ProgramStep, Source

#: Operands, slots and buffers of a pass, and its works in flight.
PassList, Works = list[Any], list[Any]


@dataclass(frozen=True)
class Binding:
    """The objects to which the steps of a program are bound.

    With ``one_launch``, a list of row operations is one launch of a Triton kernel.
    """

    kernel: Kernel
    spec: AttnSpec
    transfers: Sequence[BoundTransfer]
    memory: Memory = field(default_factory=Memory)
    device: torch.device = CPU
    one_launch: bool = False


def bind(step: ProgramStep, to: Binding) -> Action | None:
    """Return the function that runs a step, given operands and ``Work`` objects; None if the step has no effect."""
    match step:
        case program.AttendForward():
            return _attend_forward(step, to)
        case program.AttendBackward():
            return _attend_backward(step, to)
        case program.Permute():
            return _permute(step, to.device)
        case program.OutProxy():
            return _out_proxy(step)
        case program.PostReceives(transfer=number):
            return to.transfers[number].post
        case program.SendReceive(transfer=number):
            return to.transfers[number].start
        case program.Wait(transfer=number):
            return to.transfers[number].wait
    return row_list(step, to.memory, to.device) if to.one_launch else _on_rows(step, to.memory)


def taken(step: ProgramStep, transfers: Sequence[PointToPoint | AllToAll]) -> Iterator[int]:
    """Yield the indices of the operands that a step needs as ``torch.Tensor``, not as addresses."""
    match step:
        case program.AttendForward(q=q, k=k, v=v):
            yield from (q, k, v)
        case program.AttendBackward(dout=dout, q=q, k=k, v=v, out=out, lse=lse):
            yield from (dout, q, k, v, out, lse)
        case program.Permute(into=into, source=source):
            yield from (into, source)
        case program.OutProxy(dout=dout, delta=delta, into=into):
            yield from (dout, delta, into)
        case program.SendReceive(transfer=number):
            transfer = transfers[number]
            if isinstance(transfer, AllToAll):
                yield from (transfer.send, transfer.receive)
            else:
                yield from (message.operand for message in (*transfer.receives, *transfer.sends))


def _attend_forward(step: program.AttendForward, to: Binding) -> Action:
    forward, spec, tile, slot = to.kernel.forward, to.spec, step.tile, to.memory.slots + step.slot
    q, k, v = step.q, step.k, step.v

    def attend(x: PassList, works: Works) -> None:
        x[slot] = forward(x[q], x[k], x[v], tile, spec)

    return attend


def _attend_backward(step: program.AttendBackward, to: Binding) -> Action:
    backward, spec, tile, slot = to.kernel.backward, to.spec, step.tile, to.memory.slots + step.slot
    dout, q, k, v, out, lse = step.dout, step.q, step.k, step.v, step.out, step.lse

    def attend(x: PassList, works: Works) -> None:
        x[slot] = backward(x[dout], x[q], x[k], x[v], x[out], x[lse], tile, spec)

    return attend


def _on_rows(step: RowStep, memory: Memory) -> Action:
    match step:
        case program.Copy(pairs=pairs):
            return _copy(pairs)
        case program.Fill(rows=rows):
            return _fill(rows)
        case program.Sum(rows=rows):
            return _sum(rows, memory.held(step.frees), memory.slots)
        case program.Merge(rows=rows):
            return _merge(rows, memory.held(step.frees), memory.slots)


def _copy(pairs: Sequence[tuple[int, int]]) -> Action:
    into, sources = zip(*pairs, strict=True)

    def copy(x: PassList, works: Works) -> None:
        torch._foreach_copy_([x[one] for one in into], [x[one] for one in sources])

    return copy


def _sum(rows: Sequence[tuple[int, Sequence[Source]]], frees: Sequence[int], slots: int) -> Action:
    into = [to for to, _ in rows]
    sources = [[_found(one, slots) for one in some] for _, some in rows]

    def add(x: PassList, works: Works) -> None:
        sum_rows(
            [x[one] for one in into],
            [[x[a] if b is None else x[a][b] if c is None else x[a][b][c] for a, b, c in some] for some in sources],
        )
        for slot in frees:
            x[slot] = None

    return add


def _merge(
    rows: Sequence[tuple[tuple[int, int], Sequence[tuple[Source, Source]]]], frees: Sequence[int], slots: int
) -> Action:
    into = [to for to, _ in rows]
    sources = [[[_found(one, slots) for one in part] for part in parts] for _, parts in rows]

    def merge(x: PassList, works: Works) -> None:
        merge_rows(
            [(x[out], x[lse]) for out, lse in into],
            [
                [[x[a] if b is None else x[a][b] if c is None else x[a][b][c] for a, b, c in part] for part in parts]
                for parts in sources
            ],
        )
        for slot in frees:
            x[slot] = None

    return merge


def _found(source: Source, slots: int) -> tuple[int, int | None, slice | None]:
    """Return (operand, None, None) for an operand, or (slot, index of the tensor, rows) for a kernel's result."""
    if isinstance(source, int):
        return source, None, None
    return slots + source.slot, source.result, None if source.rows is None else slice(*source.rows)


def _permute(step: program.Permute, device: torch.device) -> Action:
    into, source, index = step.into, step.source, None

    def permute(x: PassList, works: Works) -> None:
        nonlocal index
        if index is None:
            # The index is created in the first run, because a pass may be compiled while fake tensors trace a program.
            index = torch.tensor(step.index).to(device, non_blocking=True)
        torch.index_select(x[source], 0, index, out=x[into])

    return permute


def _fill(rows: Sequence[tuple[int, float]]) -> Action:
    def fill(x: PassList, works: Works) -> None:
        for operand, value in rows:
            x[operand].fill_(value)

    return fill


def _out_proxy(step: program.OutProxy) -> Action:
    dout, delta, into = step.dout, step.delta, step.into

    def proxy(x: PassList, works: Works) -> None:
        out_proxy(x[dout], x[delta], x[into])

    return proxy
