"""Where the rows of each message are: at its sender before they are packed, at its receiver when they have arrived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_wallfacer.schedule import ops
from megatron_wallfacer.schedule.memory import aliases, own_views
from megatron_wallfacer.schedule.ops import Message, Move, Schedule
from megatron_wallfacer.schedule.places import Places
from megatron_wallfacer.schedule.program import Exchange, Operand, Program
from megatron_wallfacer.schedule.rows import common_rows, cut
from megatron_wallfacer.schedule.workspace import aligned


@dataclass(frozen=True, slots=True)
class MessageTensor:
    """One tensor of one end of a message.

    Attributes:
        axis: along which it goes; ``cp`` if along none.
        peer: the other end, by its index in the context-parallel group.
        tag: of the message.
        name: of the tensor.
        pieces: its rows in their order; of what has arrived, one piece.
    """

    axis: str
    peer: int
    tag: int
    name: str
    pieces: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class MoveTensors:
    """The tensors of a move's messages."""

    sends: tuple[MessageTensor, ...]
    receives: tuple[MessageTensor, ...]


def message_tensors(program: Program, strides: Mapping[str, tuple[int, ...]]) -> dict[int, MoveTensors]:
    """Return the tensors of every message of a program, by ``id`` of the move.

    What is sent of the rank's own tensors, or of a block, is named where it was before it was packed. What is sent of
    an accumulator, which may be summed into its message, is named in the message.

    Args:
        program: of this rank.
        strides: of the rank's own tensors, as the program was lowered for.
    """
    return _Messages(program, strides).run()


class _Messages:
    def __init__(self, program: Program, strides: Mapping[str, tuple[int, ...]]) -> None:
        self.program, self.schedule = program, program.schedule
        # Results are not asked for, and only they depend on sinks.
        self.places = Places(self.schedule, program.shape, strides, sinks=False)
        self.views, self.aliases = own_views(self.schedule), aliases(self.schedule)
        self.sums = _accumulators(self.schedule)

    def run(self) -> dict[int, MoveTensors]:
        return {
            id(move): MoveTensors(
                tuple(tensor for i, m in enumerate(move.sends) for tensor in self._sent(move, number, i, m)),
                tuple(tensor for m in move.receives for tensor in self._received(move, m)),
            )
            for number, move in enumerate(_in_order(self.schedule))
        }

    def _sent(self, move: Move, number: int, index: int, message: Message) -> Iterator[MessageTensor]:
        name = self.aliases.get(message.value, message.value)
        if name in self.sums:
            packet = self._packet(number, index, message)
            rows = self.places.packed(name, packet.buffer, packet.offset, message.chunks)
        elif name in self.views:
            rows = self.places.own(name)
        elif name in self.schedule.given:
            rows = self.places.packed(name, name, 0)
        else:
            rows = self.places.buffer(name)
        there = sorted(common_rows(rows.chunks, message.chunks, message.chunks), key=lambda pair: pair[1])
        for tensor in self.schedule.values[message.value].payload:
            pieces = tuple(cut(rows.tensors[tensor], self.places.rows(some)) for some, _ in there)
            yield MessageTensor(move.axis, message.peer, message.tag, tensor, pieces)

    def _received(self, move: Move, message: Message) -> Iterator[MessageTensor]:
        rows = self.places.buffer(message.value)
        for tensor in self.schedule.values[message.value].payload:
            yield MessageTensor(move.axis, message.peer, message.tag, tensor, (rows.tensors[tensor],))

    def _packet(self, number: int, index: int, message: Message) -> Operand:
        """The bytes of a message."""
        transfer = self.program.transfers[number]
        if not isinstance(transfer, Exchange):
            return self.program.operands[transfer.sends[index].operand]
        region = self.program.operands[transfer.send]
        length = region.shape[0] // len(transfer.ranks)
        assert length == aligned(length)
        return region._replace(offset=region.offset + length * transfer.ranks.index(message.peer))


def _in_order(schedule: Schedule) -> Sequence[Move]:
    """Moves in the order of their transfers: as operations first name them."""
    named = (op.move for op in schedule.ops if isinstance(op, ops.Expect | ops.Start))
    return list({id(move): move for move in named}.values())


def _accumulators(schedule: Schedule) -> frozenset[str]:
    """Names of values that are summed on this rank."""
    found: set[str | None] = set()
    for op in schedule.ops:
        if isinstance(op, ops.Attend):
            found |= {op.q_into, op.kv_into}
        elif isinstance(op, ops.Fold):
            found.add(op.into)
    return frozenset(name for name in found if name is not None)
