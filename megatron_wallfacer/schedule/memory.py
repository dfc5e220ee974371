"""Memory: from when to when each buffer of a schedule lives, and how many bytes that is at once.

Counted is what the pass adds to the tensors that its caller holds. A view of the rank's own tensors costs nothing; a
copy of it that is sent does, and so do rows of an accumulator that are copied to be sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_wallfacer.schedule.ops import (
    Assemble,
    Attend,
    Fold,
    Load,
    Message,
    Schedule,
    Start,
    Store,
    reads,
    writes,
)
from megatron_wallfacer.schedule.volume import KV_TENSORS, STATISTICS, Shape, rows_bytes


@dataclass(frozen=True, slots=True)
class Life:
    """One buffer.

    Attributes:
        name: of the value that it holds, or that it is a copy of.
        first, last: operations between which it lives, both included.
        payload, chunks: its tensors and the number of its rows in chunks.
    """

    name: str
    first: int
    last: int
    payload: tuple[str, ...]
    chunks: int


def waits(schedule: Schedule) -> dict[int, int]:
    """By the operation that starts a move, the one that first reads what it brings, and so waits for it.

    A move that brings nothing is waited for at the end.
    """
    brought: dict[str, int] = {}
    leaving = [index for index, op in enumerate(schedule.ops) if isinstance(op, Start) and not op.move.receives]
    found = dict.fromkeys(leaving, len(schedule.ops))
    for index, op in enumerate(schedule.ops):
        for name in (*reads(op), *(writes(op) if isinstance(op, Attend | Fold) else ())):
            if name in brought:
                found.setdefault(brought[name], index)
        if isinstance(op, Start):
            brought |= {message.value: index for message in op.move.receives}
    return found


def lives(schedule: Schedule) -> Iterator[Life]:
    """Every buffer of a pass."""
    last, first = dict(schedule.last_mentions), {}
    for index, op in enumerate(schedule.ops):
        for name in writes(op):
            first.setdefault(name, index)
    buffers = _buffers(schedule)
    for name, buffer in buffers.items():
        last[buffer] = max(last[buffer], last.pop(name))
    views = {op.into for op in schedule.ops if isinstance(op, Load)}
    until = waits(schedule)
    sends = _whole_sends(schedule, buffers, until)
    for name, index in last.items():
        value = schedule.values[name]
        # A view costs nothing, but for the copy of it that is on its way.
        start, end = sends[name] if name in views and name in sends else (first.get(name, 0), index)
        if name not in schedule.given and (name not in views or name in sends):
            yield Life(name, start, max(end, sends.get(name, (0, 0))[1]), value.payload, len(value.chunks))
    yield from _copied_rows(schedule, until)
    yield from _stand_ins(schedule)


def _buffers(schedule: Schedule) -> dict[str, str]:
    """Whose buffer a value has that was put together out of one other: it is another name for the same."""
    found: dict[str, str] = {}
    for op in schedule.ops:
        if isinstance(op, Assemble) and len(op.sources) == 1:
            found[op.into] = found.get(op.sources[0], op.sources[0])
    return found


def _whole_sends(
    schedule: Schedule, buffers: Mapping[str, str], until: Mapping[int, int]
) -> dict[str, tuple[int, int]]:
    """By buffer, where sends of all its rows first start, and the last operation before they are waited for."""
    found: dict[str, tuple[int, int]] = {}
    for index, message in _sends(schedule):
        if len(message.chunks) == len(schedule.values[message.value].chunks):
            name = buffers.get(message.value, message.value)
            start, end = found.get(name, (index, index))
            found[name] = min(start, index), max(end, until[index] - 1)
    return found


def _copied_rows(schedule: Schedule, until: Mapping[int, int]) -> Iterator[Life]:
    """Some rows of a value are copied to be sent."""
    for index, message in _sends(schedule):
        value = schedule.values[message.value]
        if len(message.chunks) < len(value.chunks):
            yield Life(message.value, index, until[index] - 1, value.payload, len(message.chunks))


def _sends(schedule: Schedule) -> Iterator[tuple[int, Message]]:
    """(where its move starts, message)."""
    for index, op in enumerate(schedule.ops):
        if isinstance(op, Start):
            for message in op.move.sends:
                yield index, message


def _stand_ins(schedule: Schedule) -> Iterator[Life]:
    """In backward, the stand-in for the output of each query block that tiles read."""
    used: dict[tuple[str, ...], list[int]] = {}
    for index, op in enumerate(schedule.ops):
        if isinstance(op, Attend) and schedule.backward:
            used.setdefault(op.q, []).append(index)
    for names, indices in used.items():
        yield Life(names[-1], indices[0], indices[-1], ("dout",), len(schedule.values[names[0]].chunks))


def _result_itemsize(schedule: Schedule, shape: Shape, tensor: str) -> int:
    """Bytes of an element of what the caller is given: as the inputs, but for statistics, and for kv heads that several
    parts share, which are summed there. Sinks, of which a schedule knows nothing, keep the output wide, too."""
    shared = tensor in KV_TENSORS and schedule.parts > shape.kv_heads
    return shape.itemsize_of(tensor) if shared or tensor in STATISTICS else shape.itemsize


def peak_bytes(schedule: Schedule, shape: Shape) -> float:
    """Most bytes that the buffers of a pass hold at once; a kernel's own workspace is not among them."""
    change: Counter[int] = Counter()
    for life in lives(schedule):
        size = rows_bytes(schedule, shape, life.payload, life.chunks)
        change[life.first] += size
        change[life.last + 1] -= size
    # The results come to life when the first part of them is stored, and are the caller's after.
    stored: dict[str, int] = {}
    for index, op in enumerate(schedule.ops):
        if isinstance(op, Store):
            for tensor in schedule.values[op.source].payload:
                stored.setdefault(tensor, index)
    for tensor, index in stored.items():
        change[index] += shape.elements(tensor) * _result_itemsize(schedule, shape, tensor)
    held = most = 0
    for index in sorted(change):
        held += change[index]
        most = max(most, held)
    return most
