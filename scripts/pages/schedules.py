"""Schedules as text: one numbered line per operation of one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.ops import (
    Accumulate,
    Attend,
    Concat,
    Message,
    Op,
    PostRecv,
    Schedule,
    SendRecv,
    Value,
    View,
    WriteResult,
)
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.tiles import Tile


def schedule_text(grid: Grid, rank: int, *, backward: bool = False) -> str:
    """Return the schedule of one rank as text, one numbered line per operation.

    Args:
        grid: axes and placement.
        rank: index in the context-parallel group.
        backward: the gradient pass, else the forward pass.
    """
    schedule = (backward_schedule if backward else forward_schedule)(Plan(grid), rank)
    lines = [line for op in schedule.ops for line in _op_lines(op, schedule)]
    own = _chunks(shard_chunks(rank, grid.cp_size))
    title = f"{grid}, rank {rank} of {grid.cp_size} (its chunks: {own}), {'backward' if backward else 'forward'} pass"
    return "\n".join([title, *(f"{number:>3}  {line}" for number, line in enumerate(lines, 1))])


def _op_lines(op: Op, schedule: Schedule) -> Iterator[str]:
    values = schedule.values
    match op:
        case View(into=into):
            yield f"View        {_block(values[into])}{_heads(schedule, into)}"
        case Concat(into=into):
            yield f"Concat      {_block(values[into])}"
        case PostRecv(transfer=move):
            yield f"PostRecv    {move.axis}: {_messages('receive', move.receives, move.payload, 'from')}"
        case SendRecv(transfer=move):
            parts = [
                _messages("send", move.sends, move.payload, "to"),
                _messages("receive", move.receives, move.payload, "from"),
            ]
            yield f"SendRecv    {move.axis}: {'; '.join(part for part in parts if part)}"
        case Attend():
            rows, columns = values[op.q[0]].chunks, values[op.kv[0]].chunks
            for tile in op.tiles:
                yield f"Attend      {_tile(tile, rows, columns)}"
        case Accumulate(source=source):
            yield f"Accumulate  received {_block(values[source])}"
        case WriteResult(sources=sources):
            names = dict.fromkeys(name for source in sources for name in values[source].payload)
            yield f"WriteResult {_tensors(tuple(names))}"


def _block(value: Value) -> str:
    return f"{_tensors(value.payload)} of chunks {_chunks(value.chunks)}"


def _heads(schedule: Schedule, name: str) -> str:
    if schedule.head_slices == 1:
        return ""
    return f", head slice {schedule.values[name].head_slice + 1} of {schedule.head_slices}"


def _messages(verb: str, messages: Sequence[Message], payload: Sequence[str], preposition: str) -> str:
    ends = [f"chunks {_chunks(message.chunks)} {preposition} rank {message.peer}" for message in messages]
    return f"{verb} {_tensors(payload)} of {', '.join(ends)}" if ends else ""


def _tile(tile: Tile, rows: Sequence[int], columns: Sequence[int]) -> str:
    kind = "causal" if tile.causal else "full"
    return f"queries {_chunks(rows[slice(*tile.rows)])} x keys {_chunks(columns[slice(*tile.cols)])}, {kind}"


def _tensors(names: Sequence[str]) -> str:
    return " ".join(names)


def _chunks(chunks: Sequence[int]) -> str:
    return " ".join(map(str, chunks))
