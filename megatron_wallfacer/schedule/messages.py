"""The tensors of each message: at the sender before packing, and at the receiver after arrival."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_wallfacer.schedule import ops
from megatron_wallfacer.schedule.lifetimes import aliases, local_views
from megatron_wallfacer.schedule.ops import Message, Schedule, Transfer
from megatron_wallfacer.schedule.places import Places
from megatron_wallfacer.schedule.program import AllToAll, Operand, Program
from megatron_wallfacer.schedule.rows import common_rows, cut
from megatron_wallfacer.schedule.workspace import aligned


@dataclass(frozen=True, slots=True)
class MessageTensor:
    """One tensor of a message, at the sender or at the receiver.

    ``pieces`` are operands that together have all rows of the tensor in the message, in order. The tensor at the
    receiver has one operand.
    """

    axis: str
    peer: int
    tag: int
    name: str
    pieces: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class TransferTensors:
    """The tensors of the messages of a transfer."""

    sends: tuple[MessageTensor, ...]
    receives: tuple[MessageTensor, ...]


def message_tensors(program: Program, strides: Mapping[str, tuple[int, ...]]) -> dict[int, TransferTensors]:
    """Return the tensors of every message of a program, by ``id`` of the transfer.

    For a sent message, the tensors are where the rows were before they were copied into the send buffer. For rows of an
    accumulator, the tensors are in the send buffer, because partial results may be summed there.

    Args:
        program: lowered program of one rank and pass.
        strides: strides of the local tensors by name.
    """
    return _Messages(program, strides).run()


class _Messages:
    def __init__(self, program: Program, strides: Mapping[str, tuple[int, ...]]) -> None:
        self.program, self.schedule = program, program.schedule
        # Only results depend on sinks, and no message contains a result.
        self.places = Places(self.schedule, program.shape, strides, sinks=False)
        self.views, self.aliases = local_views(self.schedule), aliases(self.schedule)
        self.accumulators = _accumulators(self.schedule)

    def run(self) -> dict[int, TransferTensors]:
        return {
            id(transfer): TransferTensors(
                tuple(tensor for i, m in enumerate(transfer.sends) for tensor in self._sent(transfer, number, i, m)),
                tuple(tensor for m in transfer.receives for tensor in self._received(transfer, m)),
            )
            for number, transfer in enumerate(_in_order(self.schedule))
        }

    def _sent(self, transfer: Transfer, number: int, index: int, message: Message) -> Iterator[MessageTensor]:
        name = self.aliases.get(message.value, message.value)
        if name in self.accumulators:
            as_bytes = self._message_bytes(number, index, message)
            rows = self.places.packed(name, as_bytes.buffer, as_bytes.offset, message.chunks)
        elif name in self.views:
            rows = self.places.own(name)
        elif name in self.schedule.given:
            rows = self.places.packed(name, name, 0)
        else:
            rows = self.places.buffer(name)
        there = sorted(common_rows(rows.chunks, message.chunks, message.chunks), key=lambda pair: pair[1])
        for tensor in self.schedule.values[message.value].payload:
            pieces = tuple(cut(rows.tensors[tensor], self.places.rows(some)) for some, _ in there)
            yield MessageTensor(transfer.axis, message.peer, message.tag, tensor, pieces)

    def _received(self, transfer: Transfer, message: Message) -> Iterator[MessageTensor]:
        rows = self.places.buffer(message.value)
        for tensor in self.schedule.values[message.value].payload:
            yield MessageTensor(transfer.axis, message.peer, message.tag, tensor, (rows.tensors[tensor],))

    def _message_bytes(self, number: int, index: int, message: Message) -> Operand:
        transfer = self.program.transfers[number]
        if not isinstance(transfer, AllToAll):
            return self.program.operands[transfer.sends[index].operand]
        region = self.program.operands[transfer.send]
        length = region.shape[0] // len(transfer.ranks)
        assert length == aligned(length)
        return region._replace(offset=region.offset + length * transfer.ranks.index(message.peer))


def _in_order(schedule: Schedule) -> Sequence[Transfer]:
    named = (op.transfer for op in schedule.ops if isinstance(op, ops.PostRecv | ops.SendRecv))
    return list({id(transfer): transfer for transfer in named}.values())


def _accumulators(schedule: Schedule) -> frozenset[str]:
    adding = (op for op in schedule.ops if isinstance(op, ops.Attend | ops.Accumulate))
    return frozenset(name for op in adding for name in ops.writes(op))
