"""Derive the steps of all ranks in one pass: the tiles that each rank computes, and the transfers that overlap them.

A step of a rank is one group of tiles (``Attend``). A transfer belongs to the next step of the sender. Transfers after
the last tiles form a separate step.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_wallfacer.schedule.ops import STATISTICS, Attend, Schedule, SendRecv, Value
from megatron_wallfacer.schedule.volume import Shape, rows_elements

#: Text for the kinds of row sets that do not belong to a ring step.
_ROWS = {"local": "local", "gathered": "gathered", "team": "local and gathered"}

#: Index of each set of chunks in the list of sets, in which the page has each set of chunks once.
ChunkSets = defaultdict[tuple[int, ...], int]


@dataclass
class ViewerStep:
    """One step of all ranks.

    Attributes:
        tiles: flat list of eight numbers per tile: rank, index of the set of query chunks, index of the set of key
            chunks, first row, end row, first column, end column and causal flag.
        transfers: messages by (axis, names of the tensors). Each message is three numbers of a flat list: sender,
            receiver and index of the set of chunks.
        volume: elements that each rank receives, in units of one Q shard.
        between_nodes: volume between nodes, summed over all ranks.
        computed: number of ranks that compute attention, by (kind of query rows, kind of key rows), such as (local,
            gathered).
    """

    tiles: list[int] = field(default_factory=list)
    transfers: dict[tuple[str, tuple[str, ...]], list[int]] = field(default_factory=lambda: defaultdict(list))
    volume: Counter[int] = field(default_factory=Counter)
    between_nodes: float = 0.0
    computed: Counter[tuple[str, str]] = field(default_factory=Counter)


def viewer_steps(
    schedules: Sequence[Schedule], nodes: Sequence[int], shape: Shape, chunk_sets: ChunkSets
) -> list[ViewerStep]:
    """Return the steps of all ranks in a forward or backward pass.

    Args:
        schedules: schedule of each rank.
        nodes: index of each rank's node.
        shape: sizes of one rank's shard.
        chunk_sets: index of each set of chunk ids. The function adds new sets.
    """
    steps: dict[int, ViewerStep] = defaultdict(ViewerStep)
    for schedule in schedules:
        number = 0
        for op in schedule.ops:
            if isinstance(op, Attend):
                _add_tiles(steps[number], schedule, op, chunk_sets)
                number += 1
            elif isinstance(op, SendRecv):
                axis, payload = op.transfer.axis, op.transfer.payload
                tensors = [tensor for tensor in payload if tensor not in STATISTICS]
                for message in op.transfer.sends:
                    step, ends = steps[number], (schedule.rank, message.peer)
                    step.transfers[axis, payload] += [*ends, chunk_sets[message.chunks]]
                    elements = sum(rows_elements(schedule, shape, tensor, len(message.chunks)) for tensor in tensors)
                    step.volume[message.peer] += elements / shape.unit
                    step.between_nodes += elements / shape.unit * (nodes[schedule.rank] != nodes[message.peer])
    return [steps[number] for number in range(max(steps, default=-1) + 1)]


def step_fields(steps: Sequence[ViewerStep]) -> list[dict[str, Any]]:
    """Return the steps as data for the page, with the accumulated volume of each step."""
    received: Counter[int] = Counter()
    rows = []
    for step in steps:
        received.update(step.volume)
        rows.append(
            {
                "text": _text(step),
                "tiles": step.tiles,
                "transfers": [
                    {"axis": axis, "payload": list(payload), "ends": ends}
                    for (axis, payload), ends in step.transfers.items()
                ],
                "volume": round(max(step.volume.values(), default=0.0), 4),
                "sum": round(max(received.values(), default=0.0), 4),
                "all": round(sum(step.volume.values()), 4),
                "between_nodes": round(step.between_nodes, 4),
            }
        )
    return rows


def _add_tiles(step: ViewerStep, schedule: Schedule, attend: Attend, chunk_sets: ChunkSets) -> None:
    q, kv = (chunk_sets[schedule.values[names[0]].chunks] for names in (attend.q, attend.kv))
    for tile in attend.tiles:
        step.tiles += [schedule.rank, q, kv, *tile.rows, *tile.cols, int(tile.causal)]
    step.computed[
        _rows_text(schedule.values[attend.q[0]], "queries"), _rows_text(schedule.values[attend.kv[0]], "keys")
    ] += 1


def _rows_text(value: Value, noun: str) -> str:
    assert value.rows is not None
    kind, step = value.rows
    return f"{_ROWS[kind]} {noun}" if kind in _ROWS else f"{noun} of ring step {step}"


def _text(step: ViewerStep) -> str:
    """Return a sentence on computation and a sentence on transfers."""
    ranks = sum(step.computed.values())
    computed = "; ".join(
        (f"{count} ranks compute " if len(step.computed) > 1 else f"All {ranks} ranks compute ") + f"{q} x {k}"
        for (q, k), count in step.computed.most_common(3)
    )
    transfers = ", ".join(
        f"{'+'.join(payload)} along {axis} ({len(ends) // 3} messages)"
        for (axis, payload), ends in step.transfers.items()
    )
    overlap = "Meanwhile they send" if computed else "They send"
    sentences = (
        f"{computed}." if computed else "The ranks compute no tiles.",
        f"{overlap} {transfers}." if transfers else "No transfer starts.",
    )
    return " ".join(sentences)
