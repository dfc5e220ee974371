"""Lower moves: the buffers of each message, what is packed into them, and the transfers that a program has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

from megatron_wallfacer.schedule import ops
from megatron_wallfacer.schedule.accumulator import Accumulator
from megatron_wallfacer.schedule.copies import Pair
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.lower_values import Values
from megatron_wallfacer.schedule.memory import OwnPart, own_parts, rows_key, value_key
from megatron_wallfacer.schedule.ops import Message, Move, Start
from megatron_wallfacer.schedule.program import (
    WORKSPACE,
    Copy,
    Exchange,
    Operand,
    Packet,
    PostReceives,
    SendReceive,
    Step,
    Transfer,
    Wait,
)
from megatron_wallfacer.schedule.rows import Rows, common_rows
from megatron_wallfacer.schedule.workspace import aligned


class Transfers:
    """Transfers of a pass.

    Args:
        values: of the pass.
        all_to_all: each head exchange is one collective.

    Attributes:
        made: the transfers by number.
    """

    def __init__(self, values: Values, *, all_to_all: bool) -> None:
        self.values, self.places, self.schedule = values, values.places, values.schedule
        self.all_to_all = all_to_all
        self.made: list[Transfer | Exchange] = []
        self._numbers: dict[int, int] = {}
        self._coming: dict[str, tuple[int, Move]] = {}
        self._copies: dict[str, Rows] = {}
        self._packed: list[Accumulator] = []
        self._own_parts = {part.start: part for part in own_parts(self.schedule)}
        self._reads = _reads(self.schedule, values, self._own_parts)

    def wait(self, names: Iterable[str]) -> Iterator[tuple[Move, tuple[Step, ...]]]:
        """Wait for the moves that bring these values."""
        for name in names:
            if name in self._coming:
                number, move = self._coming[name]
                yield move, (Wait(number),)
                for message in move.receives:
                    del self._coming[message.value]

    def wait_for_the_rest(self) -> Iterator[tuple[Move, tuple[Step, ...]]]:
        """Wait for moves that bring nothing, so that nothing has waited for them."""
        for op in self.schedule.ops:
            if isinstance(op, Start) and not op.move.receives:
                yield op.move, (Wait(self._numbers[id(op.move)]),)

    def expect(self, move: Move) -> PostReceives:
        """Post the receives of a move."""
        return PostReceives(self._number_of(move))

    def start(self, index: int, move: Move) -> Iterator[Step]:
        """Pack what a move sends, and start it."""
        packets: list[Operand] = []
        pairs: list[Pair] = []
        for position, message in enumerate(move.sends):
            name = self.values.aliases.get(message.value, message.value)
            rows = self._whole(name, message)
            if rows is None:
                key = rows_key(index, position)
                rows = self.places.placed(name, key, message.chunks)
                yield from self._pack((index, position), name, rows, pairs)
            elif name in self.values.sums:
                yield from self.values.read(name)[1]
            elif rows.packet is None:
                rows = self._copies[name] = self.places.placed(name, value_key(name))
                pairs += self.values.row_pairs(self.values.rows[name], rows, message.chunks)
            packets.append(_bytes_of(rows))
        part = self._own_parts.get(index)
        if part is not None:
            into = self.values.own_part(part, "sent")
            yield from self._pack((index, len(move.sends)), part.source, into, pairs)
        yield from self.values.settle(self._packed)
        self._packed = []
        yield from self.values.copy(pairs)
        number = self._number_of(move)
        if part is not None and self.all_to_all:
            self.made[number] = self._exchange(move, part, packets)
        else:
            if part is not None:
                own = self._own_packet(part, "received"), self._own_packet(part, "sent")
                yield Copy(self.places.numbers_of([own]))
            sends, receives = self._ends(move.sends, packets), self._ends(move.receives, self._arriving(move))
            self.made[number] = Transfer(move.channel, sends, receives, move.payload)
        self._coming |= {message.value: (number, move) for message in move.receives}
        yield SendReceive(number)

    def received(self) -> Counter[tuple[str, str]]:
        """Bytes received by (axis, tensor)."""
        found: Counter[tuple[str, str]] = Counter()
        for move in self.schedule.moves:
            for message in move.receives:
                for tensor, operand in self.values.rows[message.value].tensors.items():
                    found[move.axis, tensor] += self.places.shape.itemsize_of(tensor) * prod(operand.shape)
        return found

    def _number_of(self, move: Move) -> int:
        """The number of a move's transfer; its receives get their buffers when it is first named."""
        if id(move) not in self._numbers:
            self._numbers[id(move)] = len(self.made)
            self.made.append(Transfer(move.channel, (), ()))
            for message in move.receives:
                self.values.rows[message.value] = self.places.buffer(message.value)
        return self._numbers[id(move)]

    def _whole(self, name: str, message: Message) -> Rows | None:
        """The rows of a value, or the copy of them that was sent before, where a message sends them all."""
        rows = self.values.sums[name].rows if name in self.values.sums else self.values.rows[name]
        return self._copies.get(name, rows) if message.chunks == rows.chunks else None

    def _pack(self, at: tuple[int, int], name: str, into: Rows, pairs: list[Pair]) -> Iterator[Step]:
        """Have some rows of a value copied to where they are sent from.

        Rows of an accumulator with parts are summed into their place where nothing reads them later.

        Args:
            at: operation, and the index of the message.
            name: of the value.
            into: the rows in their place.
            pairs: of rows that are copied; more are added.
        """
        name = self.values.aliases.get(name, name)
        total = self.values.sums.get(name)
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
            self.values.pass_on(total, self.places.rows(there), packed, self.places.rows(here)[0])

    def _exchange(self, move: Move, part: OwnPart, packets: Sequence[Operand]) -> Exchange:
        """An all-to-all in place of messages: all that is sent lies side by side, and all that is received."""
        ranks = sorted([self.schedule.rank, *(message.peer for message in move.sends)])
        regions = []
        for end, others in (("sent", packets), ("received", self._arriving(move))):
            peers = (message.peer for message in (move.sends if end == "sent" else move.receives))
            parts = {self.schedule.rank: self._own_packet(part, end), **dict(zip(peers, others, strict=True))}
            (length,), first = parts[ranks[0]].shape, parts[ranks[0]].offset
            length = aligned(length)
            assert [parts[rank].offset for rank in ranks] == [first + length * place for place in range(len(ranks))]
            regions.append(self.places.number(Operand(WORKSPACE, "bytes", (length * len(ranks),), (1,), first)))
        return Exchange(move.channel, tuple(ranks), *regions, move.payload)

    def _own_packet(self, part: OwnPart, end: str) -> Operand:
        return _bytes_of(self.values.own_part(part, end))

    def _arriving(self, move: Move) -> list[Operand]:
        """The bytes of what a move brings."""
        return [_bytes_of(self.values.rows[message.value]) for message in move.receives]

    def _ends(self, messages: Sequence[Message], packets: Sequence[Operand]) -> tuple[Packet, ...]:
        return tuple(
            Packet(message.peer, self.places.number(packet), message.tag)
            for message, packet in zip(messages, packets, strict=True)
        )


def _bytes_of(rows: Rows) -> Operand:
    assert rows.packet is not None
    return rows.packet


def _reads(
    schedule: ops.Schedule, values: Values, parts: Mapping[int, OwnPart]
) -> dict[str, list[tuple[tuple[int, int], frozenset[int]]]]:
    """By value, what reads which of its chunks: operation, and the index of the message."""
    found: dict[str, list[tuple[tuple[int, int], frozenset[int]]]] = {}
    for index, op in enumerate(schedule.ops):
        if isinstance(op, Start):
            reads = [(message.value, message.chunks) for message in op.move.sends]
            if index in parts:
                reads.append((parts[index].source, shard_chunks(schedule.rank, schedule.cp_size)))
        else:
            names = (name for name in ops.reads(op) if not values.is_exchanged(index, name))
            reads = [(name, schedule.values[name].chunks) for name in names]
        for position, (name, chunks) in enumerate(reads):
            found.setdefault(values.aliases.get(name, name), []).append(((index, position), frozenset(chunks)))
    return found
