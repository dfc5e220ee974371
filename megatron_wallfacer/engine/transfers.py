"""Moves of a schedule as torch.distributed calls, with every received byte counted.

A message is one buffer, whatever tensors are in it. Nothing here blocks before :meth:`Pending.wait`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_wallfacer.engine.blocks import Block, Sizes, select
from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.schedule.ops import Message, Move, Value

Works = Sequence[dist.Work]


@dataclass(frozen=True)
class Arrival:
    """What will arrive.

    Attributes:
        block: the value's rows.
        landing: where its bytes are received: the block's own packet, or one in host memory.
    """

    block: Block
    landing: Tensor

    def settle(self) -> Block:
        """The block, once the bytes are there."""
        if self.landing is not self.block.packet:
            self.block.packet.copy_(self.landing)
        return self.block


class Pending:
    """A move on its way. Keeps what is being sent alive until it has left, and not longer."""

    def __init__(self, works: Works, arriving: dict[str, Arrival], sent: Sequence[Tensor]) -> None:
        self._works, self._sent, self._arriving = works, sent, arriving

    def wait(self) -> dict[str, Block]:
        """Block until everything has arrived and left. To be called once.

        On NCCL it is the device's current stream that waits, not the host.
        """
        for work in self._works:
            work.wait()
        arrived = {name: arrival.settle() for name, arrival in self._arriving.items()}
        self._arriving, self._works, self._sent = {}, (), ()
        return arrived


Expected = tuple[dict[str, Arrival], Works]
"""What will arrive, and the receives that have been posted for it."""


class Transfers:
    """Runs moves on the groups of a grid.

    Attributes:
        groups: the process groups.
        received: bytes received so far by (axis, tensor name), as handed over by torch.distributed.
    """

    def __init__(self, groups: AxisGroups) -> None:
        self.groups = groups
        self.received: Counter[tuple[str, str]] = Counter()

    def expect(self, move: Move, values: Mapping[str, Value], sizes: Sizes) -> Expected | None:
        """Post the receives of a move before it starts; None where a backend wants both halves at once.

        With gloo a message waits at the sender until its receive has been posted. NCCL runs the operations of a group
        one after the other, and a receive that stands before a send would keep it from leaving.
        """
        if self.groups.backend != "gloo":
            return None
        group = self._group(move)
        arriving = self._arriving(move, values, sizes)
        works = [
            dist.irecv(arriving[message.value].landing, self._global(message), group=group, tag=message.tag)
            for message in move.receives
        ]
        return arriving, works

    def start(
        self,
        move: Move,
        sent: Mapping[str, Block],
        values: Mapping[str, Value],
        sizes: Sizes,
        expected: Expected | None = None,
    ) -> Pending:
        """Begin a move.

        Args:
            move: what goes where.
            sent: the blocks that its sends name.
            values: of the schedule.
            sizes: of the call.
            expected: what :meth:`expect` gave for this move.
        """
        group = self._group(move)
        packets = [
            self._departing(self._packet(sent[message.value], message, move, values, sizes)) for message in move.sends
        ]
        expected = expected or self.expect(move, values, sizes)
        if expected is None:
            arriving = self._arriving(move, values, sizes)
            operations = [
                dist.P2POp(dist.irecv, arriving[message.value].landing, self._global(message), group)
                for message in move.receives
            ] + [
                dist.P2POp(dist.isend, packet, self._global(message), group)
                for message, packet in zip(move.sends, packets, strict=True)
            ]
            works: Works = dist.batch_isend_irecv(operations)
        else:
            arriving, receives = expected
            works = [
                *receives,
                *(
                    dist.isend(packet, self._global(message), group=group, tag=message.tag)
                    for message, packet in zip(move.sends, packets, strict=True)
                ),
            ]
        for arrival in arriving.values():
            for tensor, rows in arrival.block.tensors.items():
                self.received[move.axis, tensor] += rows.nbytes
        return Pending(works, arriving, packets)

    def _arriving(self, move: Move, values: Mapping[str, Value], sizes: Sizes) -> dict[str, Arrival]:
        blocks = {message.value: sizes.like(values[message.value]) for message in move.receives}
        return {name: Arrival(block, self._landing(block.packet)) for name, block in blocks.items()}

    def _landing(self, packet: Tensor) -> Tensor:
        """Where the bytes of a packet are received."""
        return packet

    def _departing(self, packet: Tensor) -> Tensor:
        """From where the bytes of a packet are sent."""
        return packet

    def _packet(self, block: Block, message: Message, move: Move, values: Mapping[str, Value], sizes: Sizes) -> Tensor:
        """The bytes of some rows; a copy, unless it is a whole block that lies in one buffer."""
        whole = select(block, move.payload)
        if message.chunks != block.chunks:
            rows = sizes.empty(move.payload, message.chunks, values[message.value].part)
            sizes.copy_rows(block, rows, message.chunks, move.payload)
            return rows.packet
        if whole.packet is None:
            copy = sizes.empty(move.payload, block.chunks, values[message.value].part)
            for tensor in move.payload:
                copy.tensors[tensor].copy_(block.tensors[tensor])
            # Another message of the same rows needs no second copy.
            whole.packet = copy.packet
        return whole.packet

    def _group(self, move: Move) -> dist.ProcessGroup:
        return self.groups.groups[move.channel]

    def _global(self, message: Message) -> int:
        return self.groups.global_ranks[message.peer]
