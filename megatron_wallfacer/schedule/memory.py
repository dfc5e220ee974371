"""Memory: the lifetime of each buffer of a schedule, and the bytes that a pass allocates.

A pass allocates one workspace for its buffers, its results, and what it keeps for backward. It has results of a few
attention calls (:mod:`megatron_wallfacer.schedule.held`). A view of the local tensors costs nothing. A copy of it that
is sent does, and so do rows of an accumulator that are copied to be sent.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_wallfacer.schedule.held import held_bytes
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.ops import (
    Assemble,
    Attend,
    Fold,
    Load,
    Message,
    Move,
    Schedule,
    Start,
    Store,
    is_last_fold,
    reads,
    writes,
)
from megatron_wallfacer.schedule.volume import KV_TENSORS, STATISTICS, Shape, rows_bytes
from megatron_wallfacer.schedule.workspace import Buffer, Placement, place


@dataclass(frozen=True, slots=True)
class OwnPart:
    """The part of a head exchange that stays on its rank. It has its place among those sent, and those received.

    Attributes:
        source: the value that has its rows.
        start: operation that starts the move of the other parts.
        reader: operation that reads all parts.
    """

    source: str
    start: int
    reader: int


@dataclass(frozen=True, slots=True)
class Life:
    """One buffer.

    Attributes:
        key: identifies the buffer: :func:`value_key`, :func:`rows_key`, :func:`own_key` or :func:`proxy_key`.
        name: the value that it holds, or whose copy it is.
        first, last: operations between which it is alive, both included.
        payload, chunks: its tensors, and the number of its rows in chunks.
    """

    key: Hashable
    name: str
    first: int
    last: int
    payload: tuple[str, ...]
    chunks: int


def value_key(name: str) -> Hashable:
    """Key of the buffer of a value; of a view of the rank's own tensors, of the copy that is sent."""
    return "value", name


def rows_key(start: int, position: int) -> Hashable:
    """Key of the copied rows of one send.

    Args:
        start: operation that starts the transfer.
        position: index among the sends of the transfer.
    """
    return "rows", start, position


def own_key(start: int, end: str) -> Hashable:
    """Key of the rank's own part of a head exchange.

    Args:
        start: operation that starts the move.
        end: ``sent`` or ``received``: among which parts it is.
    """
    return "own", start, end


def proxy_key(names: tuple[str, ...]) -> Hashable:
    """Key of the proxy for the output of a query block, by the values that the tiles read of it."""
    return "proxy", names


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
    """Every buffer of a pass. What is kept for backward lives one operation longer than the pass."""
    last, first = dict(schedule.last_mentions), {}
    for index, op in enumerate(schedule.ops):
        for name in writes(op):
            first.setdefault(name, index)
    buffers = aliases(schedule)
    for name, buffer in buffers.items():
        last[buffer] = max(last[buffer], last.pop(name))
    for name, end in _folded_together(schedule):
        name = buffers.get(name, name)
        last[name] = max(last[name], end)
    views = own_views(schedule)
    until = waits(schedule)
    sends = _whole_sends(schedule, buffers, until)
    for name, index in last.items():
        value = schedule.values[name]
        # A view costs nothing, but for the copy of it that is on its way.
        start, end = sends[name] if name in views and name in sends else (first.get(name, 0), index)
        if name not in schedule.given and (name not in views or name in sends):
            end = max(end, sends.get(name, (0, 0))[1])
            yield Life(value_key(name), name, start, end, value.payload, len(value.chunks))
    yield from _copied_rows(schedule, until)
    for part in own_parts(schedule):
        move, payload = _move(schedule, part), schedule.values[part.source].payload
        born = min(first[message.value] for message in move.receives)
        spans = {"sent": (part.start, until[part.start] - 1), "received": (born, part.reader)}
        for end, span in spans.items():
            yield Life(own_key(part.start, end), part.source, *span, payload, CHUNKS_PER_RANK)
    yield from _proxies(schedule, views)


def own_parts(schedule: Schedule) -> Iterator[OwnPart]:
    """The rank's own part of each head exchange: one operation reads it with all that the move brings."""
    starts = {
        tuple(sorted(message.value for message in op.move.receives)): index
        for index, op in enumerate(schedule.ops)
        if isinstance(op, Start) and op.move.axis == "head" and op.move.receives
    }
    for names, start in starts.items():
        for reader, op in enumerate(schedule.ops):
            if isinstance(op, Assemble | Store) and set(names) < set(op.sources):
                # A store has the results of both sides.
                payload = schedule.values[names[0]].payload
                others = [name for name in op.sources if name not in names]
                (source,) = (name for name in others if schedule.values[name].payload == payload)
                yield OwnPart(source, start, reader)


def places(schedule: Schedule) -> dict[Hashable, int]:
    """By key of a part of a head exchange, the rank that sends it, or to which it is sent: parts lie in this order."""
    found: dict[Hashable, int] = {}
    for part in own_parts(schedule):
        move = _move(schedule, part)
        for position, message in enumerate(move.sends):
            whole = len(message.chunks) == len(schedule.values[message.value].chunks)
            found[value_key(message.value) if whole else rows_key(part.start, position)] = message.peer
        found |= {value_key(message.value): message.peer for message in move.receives}
        found |= {own_key(part.start, end): schedule.rank for end in ("sent", "received")}
    return found


def _move(schedule: Schedule, part: OwnPart) -> Move:
    op = schedule.ops[part.start]
    assert isinstance(op, Start)
    return op.move


def aliases(schedule: Schedule) -> dict[str, str]:
    """By value that is put together out of one other, the value whose buffer it shares."""
    found: dict[str, str] = {}
    for op in schedule.ops:
        if isinstance(op, Assemble) and len(op.sources) == 1:
            found[op.into] = found.get(op.sources[0], op.sources[0])
    return found


def own_views(schedule: Schedule) -> frozenset[str]:
    """Values that are views of the rank's own tensors."""
    return frozenset(op.into for op in schedule.ops if isinstance(op, Load))


def _folded_together(schedule: Schedule) -> Iterator[tuple[str, int]]:
    """Value that is folded, and the last of the folds that follow one another: they are one step."""
    end = 0
    for index in reversed(range(len(schedule.ops))):
        op = schedule.ops[index]
        if isinstance(op, Fold):
            end = index if is_last_fold(schedule, index) else end
            yield op.source, end


def _whole_sends(
    schedule: Schedule, buffers: Mapping[str, str], until: Mapping[int, int]
) -> dict[str, tuple[int, int]]:
    """By buffer, where sends of all its rows first start, and the last operation before they are waited for."""
    found: dict[str, tuple[int, int]] = {}
    for index, _, message in _sends(schedule):
        if len(message.chunks) == len(schedule.values[message.value].chunks):
            name = buffers.get(message.value, message.value)
            start, end = found.get(name, (index, index))
            found[name] = min(start, index), max(end, until[index] - 1)
    return found


def _copied_rows(schedule: Schedule, until: Mapping[int, int]) -> Iterator[Life]:
    """Some rows of a value are copied to be sent."""
    for index, position, message in _sends(schedule):
        value = schedule.values[message.value]
        if len(message.chunks) < len(value.chunks):
            key = rows_key(index, position)
            yield Life(key, message.value, index, until[index] - 1, value.payload, len(message.chunks))


def _sends(schedule: Schedule) -> Iterator[tuple[int, int, Message]]:
    """(operation that starts its move, index among the move's sends, message)."""
    for index, op in enumerate(schedule.ops):
        if isinstance(op, Start):
            for position, message in enumerate(op.move.sends):
                yield index, position, message


def _proxies(schedule: Schedule, views: frozenset[str]) -> Iterator[Life]:
    """In backward, the proxy for the output of each query block that tiles read; own rows have their output."""
    used: dict[tuple[str, ...], list[int]] = {}
    for index, op in enumerate(schedule.ops):
        if isinstance(op, Attend) and schedule.backward and not views.issuperset(op.q):
            used.setdefault(op.q, []).append(index)
    for names, indices in used.items():
        chunks = len(schedule.values[names[0]].chunks)
        yield Life(proxy_key(names), names[-1], indices[0], indices[-1], ("dout",), chunks)


def workspace(schedule: Schedule, shape: Shape) -> Placement:
    """Return the offset of each buffer in the workspace of a pass.

    Args:
        schedule: the pass of one rank.
        shape: sizes of the rank's shard.
    """
    kept, order = kept_buffers(schedule), places(schedule)
    return place(
        Buffer(life.key, life.first, life.last, int(rows_bytes(schedule, shape, life.payload, life.chunks)))
        for life in sorted(lives(schedule), key=lambda life: order.get(life.key, -1))
        if life.key not in kept
    )


def kept_buffers(schedule: Schedule) -> dict[Hashable, str]:
    """By key of a buffer that is kept for backward, the name under which it is kept."""
    buffers = aliases(schedule)
    return {value_key(buffers.get(name, name)): name for name in schedule.keeps}


def result_tensors(schedule: Schedule) -> tuple[str, ...]:
    """Tensors that the pass gives to its caller."""
    return ("dq", "dk", "dv") if schedule.backward else ("out", "lse")


def result_is_wide(schedule: Schedule, shape: Shape, tensor: str, *, sinks: bool = False) -> bool:
    """Whether a result is in the accumulation dtype: statistics, sums that are not complete when they are stored.

    Args:
        schedule: the pass of one rank.
        shape: sizes of the rank's shard.
        tensor: name of the result.
        sinks: sinks are merged into the output after the pass.
    """
    # Parts that share kv heads are added up in the result.
    shared = tensor in KV_TENSORS and schedule.parts > shape.kv_heads
    return shared or tensor in STATISTICS or (sinks and tensor == "out")


def result_bytes(schedule: Schedule, shape: Shape) -> int:
    """Bytes of the results of a pass."""
    return sum(
        shape.elements(tensor)
        * (shape.itemsize_of(tensor) if result_is_wide(schedule, shape, tensor) else shape.itemsize)
        for tensor in result_tensors(schedule)
    )


def peak_bytes(schedule: Schedule, shape: Shape) -> int:
    """Return the bytes that a pass allocates: workspace, results, what it keeps for backward, and results of calls.

    A kernel's own workspace is not among them.
    """
    held = held_bytes(schedule, shape, aliases(schedule))
    return workspace(schedule, shape).nbytes + returned_bytes(schedule, shape) + held


def returned_bytes(schedule: Schedule, shape: Shape) -> int:
    """Return the bytes of the results of a pass and of what it keeps for backward."""
    kept = sum(int(rows_bytes(schedule, shape, *_size(schedule, name))) for name in schedule.keeps)
    return result_bytes(schedule, shape) + kept


def graph_bytes(schedule: Schedule, shape: Shape) -> int:
    """Return the bytes that a pass holds once it is a CUDA graph: its buffers, and a static copy of all that it reads.

    A kernel's own workspace and results are not among them, held ones neither: they lie in the pool of the graphs.
    """
    loaded = {tensor for op in schedule.ops if isinstance(op, Load) for tensor in schedule.values[op.into].payload}
    # After an exchange along the head axis backward reads what was kept, not the rank's own q, k and v.
    inputs = ("q", "k", "v") if "k" in loaded or not schedule.backward else ()
    own = sum(shape.elements(tensor) * shape.itemsize for tensor in inputs)
    if schedule.backward:
        own += 2 * shape.elements("out") * shape.itemsize  # and as many of its gradient
        own += sum(map(shape.bytes, STATISTICS))
    given = sum(int(rows_bytes(schedule, shape, *_size(schedule, name))) for name in schedule.given)
    return own + given + workspace(schedule, shape).nbytes + returned_bytes(schedule, shape)


def graphed_peak_bytes(schedules: Sequence[Schedule], shape: Shape) -> int:
    """Return the most bytes that the passes of a layer need where each is a CUDA graph.

    All graphs are held, and a replay copies its results and kept values out of one of them.

    Args:
        schedules: forward and backward of one rank.
        shape: sizes of the rank's shard.
    """
    held = sum(graph_bytes(schedule, shape) for schedule in schedules)
    return held + max(returned_bytes(schedule, shape) for schedule in schedules)


def _size(schedule: Schedule, name: str) -> tuple[tuple[str, ...], int]:
    value = schedule.values[name]
    return value.payload, len(value.chunks)
