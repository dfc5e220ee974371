"""Lifetimes of the buffers of a schedule, from the first operation that needs a buffer to the last one.

The rank's own tensors need no buffer, except rows that are copied into a message. Rows of an accumulator that are
copied into a message also need a buffer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

from megatron_wallfacer.schedule import ops
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.ops import Schedule


@dataclass(frozen=True, slots=True)
class LocalPart:
    """The part of a head exchange that stays on this rank. The part is copied from a send buffer to a receive buffer.

    Attributes:
        source: name of the value that contains the rows of the part.
        start: index of the operation that starts the head exchange.
        reader: index of the operation that reads all received parts.
    """

    source: str
    start: int
    reader: int


@dataclass(frozen=True, slots=True)
class Lifetime:
    """The lifetime of one buffer.

    Attributes:
        key: key of the buffer: :func:`value_key`, :func:`rows_key`, :func:`local_part_key` or :func:`proxy_key`.
        name: name of the value that the buffer contains in full or in part.
        first: index of the first operation that needs the buffer.
        last: index of the last operation that needs the buffer.
        payload: names of the tensors in the buffer.
        chunks: number of chunks in the buffer.
    """

    key: Hashable
    name: str
    first: int
    last: int
    payload: tuple[str, ...]
    chunks: int


def value_key(name: str) -> Hashable:
    """Return the key of the buffer that stores the value ``name``."""
    return "value", name


def rows_key(start: int, position: int) -> Hashable:
    """Return the key of the send buffer of a message, given the index of its operation and its own index."""
    return "rows", start, position


def local_part_key(start: int, end: str) -> Hashable:
    """Return the dictionary key of a :class:`LocalPart`'s buffer. ``end`` is ``sent`` or ``received``."""
    return "local part", start, end


def proxy_key(names: tuple[str, ...]) -> Hashable:
    """Return the key of the buffer for ``out_proxy`` of a query block, given the names of its values."""
    return "proxy", names


def waits(schedule: Schedule) -> dict[int, int]:
    """Return for each operation that starts a transfer the index of the operation that waits for the transfer.

    The first operation that reads a received value waits for its transfer. The wait for a transfer without receives is
    after the last operation.
    """
    started: dict[str, int] = {}
    sends_only = [i for i, op in enumerate(schedule.ops) if isinstance(op, ops.SendRecv) and not op.transfer.receives]
    waiting = dict.fromkeys(sends_only, len(schedule.ops))
    for index, op in enumerate(schedule.ops):
        for name in (*ops.reads(op), *(ops.writes(op) if isinstance(op, ops.Attend | ops.Accumulate) else ())):
            if name in started:
                waiting.setdefault(started[name], index)
        if isinstance(op, ops.SendRecv):
            started |= {message.value: index for message in op.transfer.receives}
    return waiting


def lifetimes(schedule: Schedule) -> Iterator[Lifetime]:
    """Yield the lifetime of every buffer of a pass. Buffers kept for backward outlive the last operation."""
    last, first = dict(schedule.last_mentions), {}
    for index, op in enumerate(schedule.ops):
        for name in ops.writes(op):
            first.setdefault(name, index)
    buffers = aliases(schedule)
    for name, buffer in buffers.items():
        last[buffer] = max(last[buffer], last.pop(name))
    for name, end in _ends_of_runs(schedule):
        name = buffers.get(name, name)
        last[name] = max(last[name], end)
    views = local_views(schedule)
    until = waits(schedule)
    sends = _whole_sends(schedule, buffers, until)
    for name, index in last.items():
        value = schedule.values[name]
        # The rank's own tensors have a buffer only if a copy of their rows is sent.
        start, end = sends[name] if name in views and name in sends else (first.get(name, 0), index)
        if name not in schedule.given and (name not in views or name in sends):
            end = max(end, sends.get(name, (0, 0))[1])
            yield Lifetime(value_key(name), name, start, end, value.payload, len(value.chunks))
    yield from _copied_rows(schedule, until)
    for part in local_parts(schedule):
        transfer, payload = _transfer(schedule, part), schedule.values[part.source].payload
        created = min(first[message.value] for message in transfer.receives)
        spans = {"sent": (part.start, until[part.start] - 1), "received": (created, part.reader)}
        for end, span in spans.items():
            yield Lifetime(local_part_key(part.start, end), part.source, *span, payload, CHUNKS_PER_RANK)
    yield from _proxies(schedule, views)


def local_parts(schedule: Schedule) -> Iterator[LocalPart]:
    """Yield the local part of each head exchange. One operation reads the local part and all received parts."""
    starts = {
        tuple(sorted(message.value for message in op.transfer.receives)): index
        for index, op in enumerate(schedule.ops)
        if isinstance(op, ops.SendRecv) and op.transfer.axis == "head" and op.transfer.receives
    }
    for names, start in starts.items():
        for reader, op in enumerate(schedule.ops):
            if isinstance(op, ops.Concat | ops.WriteResult) and set(names) < set(op.sources):
                # WriteResult reads results of both operands, so the payload identifies the local part.
                payload = schedule.values[names[0]].payload
                others = [name for name in op.sources if name not in names]
                (source,) = (name for name in others if schedule.values[name].payload == payload)
                yield LocalPart(source, start, reader)


def head_exchange_ranks(schedule: Schedule) -> dict[Hashable, int]:
    """Return the peer of each buffer of a head exchange, keyed by buffer. Memory has buffers in the order of peers."""
    peers: dict[Hashable, int] = {}
    for part in local_parts(schedule):
        transfer = _transfer(schedule, part)
        for position, message in enumerate(transfer.sends):
            is_whole = len(message.chunks) == len(schedule.values[message.value].chunks)
            peers[value_key(message.value) if is_whole else rows_key(part.start, position)] = message.peer
        peers |= {value_key(message.value): message.peer for message in transfer.receives}
        peers |= {local_part_key(part.start, end): schedule.rank for end in ("sent", "received")}
    return peers


def aliases(schedule: Schedule) -> dict[str, str]:
    """Return {value: source} for each :class:`Concat` with a single source. Value and source share a buffer."""
    shared: dict[str, str] = {}
    for op in schedule.ops:
        if isinstance(op, ops.Concat) and len(op.sources) == 1:
            shared[op.into] = shared.get(op.sources[0], op.sources[0])
    return shared


def local_views(schedule: Schedule) -> frozenset[str]:
    """Return the names of the values that are views of the local tensors."""
    return frozenset(op.into for op in schedule.ops if isinstance(op, ops.View))


def _transfer(schedule: Schedule, part: LocalPart) -> ops.Transfer:
    op = schedule.ops[part.start]
    assert isinstance(op, ops.SendRecv)
    return op.transfer


def _ends_of_runs(schedule: Schedule) -> Iterator[tuple[str, int]]:
    end = 0
    for index in reversed(range(len(schedule.ops))):
        op = schedule.ops[index]
        if isinstance(op, ops.Accumulate):
            end = index if ops.is_last_accumulate(schedule, index) else end
            yield op.source, end


def _whole_sends(
    schedule: Schedule, buffers: Mapping[str, str], until: Mapping[int, int]
) -> dict[str, tuple[int, int]]:
    """Return, for each value that is sent as a whole, the first and the last operation that run while it is sent."""
    spans: dict[str, tuple[int, int]] = {}
    for index, _, message in _sends(schedule):
        if len(message.chunks) == len(schedule.values[message.value].chunks):
            name = buffers.get(message.value, message.value)
            start, end = spans.get(name, (index, index))
            spans[name] = min(start, index), max(end, until[index] - 1)
    return spans


def _copied_rows(schedule: Schedule, until: Mapping[int, int]) -> Iterator[Lifetime]:
    for index, position, message in _sends(schedule):
        value = schedule.values[message.value]
        if len(message.chunks) < len(value.chunks):
            key = rows_key(index, position)
            yield Lifetime(key, message.value, index, until[index] - 1, value.payload, len(message.chunks))


def _sends(schedule: Schedule) -> Iterator[tuple[int, int, ops.Message]]:
    """Yield (index of the operation, index of the message in the transfer, message) for every sent message."""
    for index, op in enumerate(schedule.ops):
        if isinstance(op, ops.SendRecv):
            for position, message in enumerate(op.transfer.sends):
                yield index, position, message


def _proxies(schedule: Schedule, views: frozenset[str]) -> Iterator[Lifetime]:
    used: dict[tuple[str, ...], list[int]] = {}
    for index, op in enumerate(schedule.ops):
        if isinstance(op, ops.Attend) and schedule.backward and not views.issuperset(op.q):
            used.setdefault(op.q, []).append(index)
    for names, indices in used.items():
        chunks = len(schedule.values[names[0]].chunks)
        yield Lifetime(proxy_key(names), names[-1], indices[0], indices[-1], ("dout",), chunks)
