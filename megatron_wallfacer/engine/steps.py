"""Steps of a program as calls: bound once to a kernel and to process groups, then run in every pass.

A bound step gets the operands of the pass by number, and the works in flight by number of their transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine.groups import CPU
from megatron_wallfacer.engine.merge import add_rows, copy_rows, merge_into, out_proxy, permute_rows
from megatron_wallfacer.engine.transfers import Action, BoundTransfer
from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel
from megatron_wallfacer.schedule import program
from megatron_wallfacer.schedule.program import Piece, Step

Operands = Sequence[Tensor]
Works = list[Any]


@dataclass(frozen=True)
class Binding:
    """What steps are bound to: the local kernel, its constant arguments, the transfers by number, the device."""

    kernel: Kernel
    spec: AttnSpec
    transfers: Sequence[BoundTransfer]
    device: torch.device = CPU


def bind(step: Step, to: Binding) -> Action | None:
    """Return the call of a step; None where there is nothing to do."""
    match step:
        case program.AttendForward():
            return _attend_forward(step, to)
        case program.AttendBackward():
            return _attend_backward(step, to)
        case program.Copy(pairs=pairs):
            return _copy(pairs)
        case program.Permute():
            return _permute(step, to.device)
        case program.Add(pairs=pairs):
            return _add(pairs)
        case program.Merge(parts=parts):
            return _merge(parts)
        case program.Fill(rows=rows):
            return _fill(rows)
        case program.OutProxy():
            return _out_proxy(step)
        case program.PostReceives(transfer=number):
            return to.transfers[number].post
        case program.SendReceive(transfer=number):
            return to.transfers[number].start
        case program.Wait(transfer=number):
            return to.transfers[number].wait


def _attend_forward(step: program.AttendForward, to: Binding) -> Action:
    forward, spec, tile = to.kernel.forward, to.spec, step.tile
    q, k, v = step.q, step.k, step.v
    take = _take_partial_output(step.pieces)

    def attend(operands: Operands, works: Works) -> None:
        take(operands, *forward(operands[q], operands[k], operands[v], tile, spec))

    return attend


def _attend_backward(step: program.AttendBackward, to: Binding) -> Action:
    backward, spec, tile = to.kernel.backward, to.spec, step.tile
    dout, q, k, v, out, lse = step.dout, step.q, step.k, step.v, step.out, step.lse
    take = _take_gradients(step.q_pieces, step.kv_pieces)

    def attend(x: Operands, works: Works) -> None:
        take(x, *backward(x[dout], x[q], x[k], x[v], x[out], x[lse], tile, spec))

    return attend


def _take_partial_output(pieces: Sequence[Piece]) -> Callable[[Operands, Tensor, Tensor], None]:
    """Write a kernel's output and lse, or merge them, piece by piece."""
    if len(pieces) == 1:
        ((_, (out, lse), add),) = pieces

        def merge(operands: Operands, part_out: Tensor, part_lse: Tensor) -> None:
            merge_into(operands[out], operands[lse], part_out, part_lse)

        def write(operands: Operands, part_out: Tensor, part_lse: Tensor) -> None:
            copy_rows((operands[out], operands[lse]), (part_out, part_lse))

        return merge if add else write

    singles = [(slice(*piece.rows), _take_partial_output([piece])) for piece in pieces]

    def take(operands: Operands, part_out: Tensor, part_lse: Tensor) -> None:
        for rows, single in singles:
            single(operands, part_out[rows], part_lse[rows])

    return take


def _take_gradients(
    q_pieces: Sequence[Piece], kv_pieces: Sequence[Piece]
) -> Callable[[Operands, Tensor, Tensor, Tensor], None]:
    """Write a kernel's gradients, or add them: all that are written in one call, all that are added in another."""
    # (accumulator, which gradient, rows of it), by whether it is added.
    parts = {
        add: [
            (operand, number, piece.rows)
            for offset, pieces in ((0, q_pieces), (1, kv_pieces))
            for piece in pieces
            if piece.add == add
            for number, operand in enumerate(piece.into, offset)
        ]
        for add in (False, True)
    }
    written, added = parts[False], parts[True]

    def take(operands: Operands, *gradients: Tensor) -> None:
        for todo, run in ((written, copy_rows), (added, add_rows)):
            if todo:
                run(
                    [operands[operand] for operand, _, _ in todo],
                    [gradients[n] if rows is None else gradients[n][rows[0] : rows[1]] for _, n, rows in todo],
                )

    return take


def _copy(pairs: Sequence[tuple[int, int]]) -> Action:
    into, sources = zip(*pairs, strict=True)

    def copy(operands: Operands, works: Works) -> None:
        copy_rows([operands[one] for one in into], [operands[one] for one in sources])

    return copy


def _permute(step: program.Permute, device: torch.device) -> Action:
    into, source, index = step.into, step.source, None

    def permute(operands: Operands, works: Works) -> None:
        nonlocal index
        if index is None:
            # In the first run and not before: a pass may be compiled while a program is traced, with fake tensors.
            index = torch.tensor(step.index).to(device, non_blocking=True)
        permute_rows(operands[into], operands[source], index)

    return permute


def _add(pairs: Sequence[tuple[int, int]]) -> Action:
    into, sources = zip(*pairs, strict=True)

    def add(operands: Operands, works: Works) -> None:
        add_rows([operands[one] for one in into], [operands[one] for one in sources])

    return add


def _merge(parts: Sequence[tuple[int, int, int, int]]) -> Action:
    def merge(operands: Operands, works: Works) -> None:
        for out, lse, part_out, part_lse in parts:
            merge_into(operands[out], operands[lse], operands[part_out], operands[part_lse])

    return merge


def _fill(rows: Sequence[tuple[int, float]]) -> Action:
    def fill(operands: Operands, works: Works) -> None:
        for operand, value in rows:
            operands[operand].fill_(value)

    return fill


def _out_proxy(step: program.OutProxy) -> Action:
    dout, delta, into = step.dout, step.delta, step.into

    def proxy(operands: Operands, works: Works) -> None:
        out_proxy(operands[dout], operands[delta], operands[into])

    return proxy
