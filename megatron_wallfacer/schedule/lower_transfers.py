"""Lowering of transfers: the buffer of each message, and the steps that pack rows into the buffer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

from megatron_wallfacer.schedule import ops, program
from megatron_wallfacer.schedule.accumulator import Accumulator
from megatron_wallfacer.schedule.copies import Pair
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.lifetimes import LocalPart, local_parts, rows_key, value_key
from megatron_wallfacer.schedule.lower_values import Values
from megatron_wallfacer.schedule.ops import Message, SendRecv, Transfer
from megatron_wallfacer.schedule.program import WORKSPACE, Operand, ProgramStep
from megatron_wallfacer.schedule.rows import Rows, common_rows
from megatron_wallfacer.schedule.workspace import aligned


class TransferLowering:
    """Lowering of the transfers of a pass.

    Attributes:
        all_to_all: whether each head exchange is one collective.
        made: lowered transfers; the index is the number of the transfer.
    """

    def __init__(self, values: Values, *, all_to_all: bool) -> None:
        self.values, self.places, self.schedule = values, values.places, values.schedule
        self.all_to_all = all_to_all
        self.made: list[program.PointToPoint | program.AllToAll] = []
        self._numbers: dict[int, int] = {}
        self._receiving: dict[str, tuple[int, Transfer]] = {}
        self._copies: dict[str, Rows] = {}
        self._packed: list[Accumulator] = []
        self._local_parts = {part.start: part for part in local_parts(self.schedule)}
        self._reads = _reads(self.schedule, values, self._local_parts)

    def wait(self, names: Iterable[str]) -> Iterator[tuple[Transfer, tuple[ProgramStep, ...]]]:
        """Yield the waits for the transfers that receive the named values."""
        for name in names:
            if name in self._receiving:
                number, transfer = self._receiving[name]
                yield transfer, (program.Wait(number),)
                for message in transfer.receives:
                    del self._receiving[message.value]

    def wait_for_the_rest(self) -> Iterator[tuple[Transfer, tuple[ProgramStep, ...]]]:
        """Yield a wait for each transfer that has only sends. These waits belong to the end of the pass."""
        for op in self.schedule.ops:
            if isinstance(op, SendRecv) and not op.transfer.receives:
                yield op.transfer, (program.Wait(self._numbers[id(op.transfer)]),)

    def send_recv(self, index: int, transfer: Transfer) -> Iterator[ProgramStep]:
        """Yield the steps that pack the messages of a transfer and start it."""
        buffers: list[Operand] = []
        pairs: list[Pair] = []
        for position, message in enumerate(transfer.sends):
            name = self.values.aliases.get(message.value, message.value)
            rows = self._whole(name, message)
            if rows is None:
                key = rows_key(index, position)
                rows = self.places.placed(name, key, message.chunks)
                yield from self._pack((index, position), name, rows, pairs)
            elif name in self.values.accumulators:
                yield from self.values.read(name)[1]
            elif rows.as_bytes is None:
                rows = self._copies[name] = self.places.placed(name, value_key(name))
                pairs += self.values.row_pairs(self.values.rows[name], rows, message.chunks)
            buffers.append(_bytes_of(rows))
        part = self._local_parts.get(index)
        if part is not None:
            into = self.values.local_part(part, "sent")
            yield from self._pack((index, len(transfer.sends)), part.source, into, pairs)
        yield from self.values.finalize(self._packed)
        self._packed = []
        yield from self.values.copy(pairs)
        number = self.number_of(transfer)
        if part is not None and self.all_to_all:
            self.made[number] = self._exchange(transfer, part, buffers)
        else:
            if part is not None:
                own = self._local_bytes(part, "received"), self._local_bytes(part, "sent")
                yield program.Copy(self.places.numbers_of([own]))
            sends, receives = (
                self._ends(transfer.sends, buffers),
                self._ends(transfer.receives, self._arriving(transfer)),
            )
            self.made[number] = program.PointToPoint(transfer.channel, sends, receives, transfer.payload)
        self._receiving |= {message.value: (number, transfer) for message in transfer.receives}
        yield program.SendReceive(number)

    def received(self) -> Counter[tuple[str, str]]:
        """Return the bytes that the pass receives, by (axis, tensor)."""
        found: Counter[tuple[str, str]] = Counter()
        for transfer in self.schedule.transfers:
            for message in transfer.receives:
                for tensor, operand in self.values.rows[message.value].tensors.items():
                    found[transfer.axis, tensor] += self.places.shape.itemsize_of(tensor) * prod(operand.shape)
        return found

    def number_of(self, transfer: Transfer) -> int:
        """Return the index of a transfer in :attr:`made`. The first call assigns the transfer's receive buffers."""
        if id(transfer) not in self._numbers:
            self._numbers[id(transfer)] = len(self.made)
            self.made.append(program.PointToPoint(transfer.channel, (), ()))
            for message in transfer.receives:
                self.values.rows[message.value] = self.places.buffer(message.value)
        return self._numbers[id(transfer)]

    def _whole(self, name: str, message: Message) -> Rows | None:
        """Return the rows of a value, or an existing copy. Return None if the message sends only some of the rows."""
        rows = self.values.accumulators[name].rows if name in self.values.accumulators else self.values.rows[name]
        return self._copies.get(name, rows) if message.chunks == rows.chunks else None

    def _pack(self, at: tuple[int, int], name: str, into: Rows, pairs: list[Pair]) -> Iterator[ProgramStep]:
        """Yield the steps that must run before rows are copied into a message buffer. Append the copies to ``pairs``.

        If no later operation reads the rows, their partial results are summed directly in the message buffer. ``at`` is
        (index of the operation, index of the message).
        """
        name = self.values.aliases.get(name, name)
        total = self.values.accumulators.get(name)
        later = (chunks for reader, chunks in self._reads[name] if reader > at)
        if total is None or not total.parts or not all(chunks.isdisjoint(into.chunks) for chunks in later):
            rows, steps = self.values.read(name)
            yield from steps
            pairs += self.values.row_pairs(rows, into, into.chunks)
            return
        packed = self.values.accumulator(into)
        self._packed.append(packed)
        for there, here in common_rows(total.rows.chunks, into.chunks, into.chunks):
            yield from self.values.fill(total, self.places.rows(there))
            self.values.hand_over(total, self.places.rows(there), packed, self.places.rows(here)[0])

    def _exchange(self, transfer: Transfer, part: LocalPart, buffers: Sequence[Operand]) -> program.AllToAll:
        """Return a head exchange as one all-to-all. Sent parts are adjacent in memory, as are received parts."""
        ranks = sorted([self.schedule.rank, *(message.peer for message in transfer.sends)])
        regions = []
        for end, others in (("sent", buffers), ("received", self._arriving(transfer))):
            peers = (message.peer for message in (transfer.sends if end == "sent" else transfer.receives))
            parts = {self.schedule.rank: self._local_bytes(part, end), **dict(zip(peers, others, strict=True))}
            (length,), first = parts[ranks[0]].shape, parts[ranks[0]].offset
            length = aligned(length)
            assert [parts[rank].offset for rank in ranks] == [first + length * place for place in range(len(ranks))]
            regions.append(self.places.number(Operand(WORKSPACE, "bytes", (length * len(ranks),), (1,), first)))
        return program.AllToAll(transfer.channel, tuple(ranks), *regions, transfer.payload)

    def _local_bytes(self, part: LocalPart, end: str) -> Operand:
        return _bytes_of(self.values.local_part(part, end))

    def _arriving(self, transfer: Transfer) -> list[Operand]:
        return [_bytes_of(self.values.rows[message.value]) for message in transfer.receives]

    def _ends(self, messages: Sequence[Message], buffers: Sequence[Operand]) -> tuple[program.MessageBuffer, ...]:
        return tuple(
            program.MessageBuffer(message.peer, self.places.number(as_bytes), message.tag)
            for message, as_bytes in zip(messages, buffers, strict=True)
        )


def _bytes_of(rows: Rows) -> Operand:
    assert rows.as_bytes is not None
    return rows.as_bytes


def _reads(
    schedule: ops.Schedule, values: Values, parts: Mapping[int, LocalPart]
) -> dict[str, list[tuple[tuple[int, int], frozenset[int]]]]:
    """Return, for each value, the operations and messages that read it.

    Each element is ((index of the operation, index of the message), ids of the chunks that are read).
    """
    found: dict[str, list[tuple[tuple[int, int], frozenset[int]]]] = {}
    for index, op in enumerate(schedule.ops):
        if isinstance(op, SendRecv):
            reads = [(message.value, message.chunks) for message in op.transfer.sends]
            if index in parts:
                reads.append((parts[index].source, shard_chunks(schedule.rank, schedule.cp_size)))
        else:
            names = (name for name in ops.reads(op) if not values.is_exchanged(index, name))
            reads = [(name, schedule.values[name].chunks) for name in names]
        for position, (name, chunks) in enumerate(reads):
            found.setdefault(values.aliases.get(name, name), []).append(((index, position), frozenset(chunks)))
    return found
