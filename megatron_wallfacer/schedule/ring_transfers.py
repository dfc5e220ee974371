"""Transfers along the ring: the blocks of the ring operand, and results that return to the origin of each block."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_wallfacer.schedule.head_group import HeadGroup
from megatron_wallfacer.schedule.ops import GATHERED, LOCAL, TENSORS, RowSet, received
from megatron_wallfacer.schedule.ring import Hop, block_holder


class RingTransfers:
    """Ring transfers of one head group."""

    def __init__(self, group: HeadGroup) -> None:
        self.group, self.operands, self.emitter = group, group.operands, group.emitter
        self._sent: set[int] = set()

    def send_next(self, rows: RowSet) -> None:
        """Send a block to the next ranks of the ring, before this rank computes with the block for the first time.

        The first block is sent when its gathered rows have arrived.
        """
        if rows != LOCAL:
            self.start_hops(0 if rows == GATHERED else rows.step)

    def start_hops(self, step: int, *axes: str) -> None:
        """Send the block of a ring step to the next ranks, and receive blocks of later ring steps.

        The block is sent on after it has arrived at this rank. If ``axes`` are given, only hops along these axes start.
        Hops that an earlier call started are omitted.
        """
        operands, emitter = self.operands, self.emitter
        for hop in operands.ring_steps[step].destinations:
            if hop.step in self._sent or (axes and hop.axis not in axes):
                continue
            self._sent.add(hop.step)
            for tensors in operands.tensor_groups(operands.ring_operand):
                block = self._first_block(tensors) if step == 0 else emitter.name(received(step), tensors)
                arriving, rows = operands.ring_steps[hop.step], received(hop.step)
                name = emitter.name(rows, tensors)
                emitter.value(name, TENSORS[tensors], operands.block_of(arriving.origin), rows=rows)
                send = emitter.message(hop.peer, block, "block", tensors, hop.step)
                receive = emitter.message(arriving.source.peer, name, "block", tensors, hop.step)
                emitter.send_recv(hop.axis, [send], [receive])

    def _first_block(self, tensors: str) -> str:
        side = self.operands.ring_operand
        names = [self.group.tensor_rows(tensors, side, rows) for rows in self.operands.first_block]
        return names[0] if len(names) == 1 else self.emitter.concat(self.emitter.name("first", tensors), names)

    def send_results(self, step: int) -> None:
        """Send the results of a ring step towards the origin of its block.

        Gradients follow the path of the block, and ranks on the path accumulate them. A partial output is sent directly
        to the block's origin rank.
        """
        side = self.operands.ring_operand
        if not self.operands.results(side):
            return
        if self.operands.backward:
            self.group.accumulate(self.group.accumulator(side, received(step)))
            self._send_gradient(step, self.operands.ring_steps[step].gradient_destination)
        else:
            self._send_partial_output(step)

    def _send_gradient(self, step: int, hop: Hop) -> None:
        arriving = self.operands.ring_steps[hop.step]
        along = hop.axis, hop.closes_pass
        peer = next(one.peer for one in arriving.gradient_sources if (one.axis, one.closes_pass) == along)
        kind, chunks = "close" if hop.closes_pass else "sum", self.operands.block_of(arriving.origin)
        self._exchange_results(kind, hop.axis, step, hop.step, (hop.peer, peer), chunks, hop.step)

    def _send_partial_output(self, step: int) -> None:
        operands, origin = self.operands, self.operands.ring_steps[step].origin
        for rows in operands.first_block:
            self.group.accumulate(self.group.accumulator(operands.ring_operand, rows))
        holder = block_holder(operands.grid, operands.rank, origin)
        self._exchange_results("return", "cp", step, 0, (origin, holder), operands.block_of(operands.rank), step)

    def _exchange_results(
        self, kind: str, axis: str, step: int, into: int, peers: tuple[int, int], chunks: Sequence[int], number: int
    ) -> None:
        """Send the results of one ring step, and receive results from another rank.

        Results of ring step ``step`` are sent to rank ``peers[0]``. Results that arrive from rank ``peers[1]`` are
        added to the results of ring step ``into``. ``number`` distinguishes messages of one kind between two ranks.
        """
        operands, emitter, side = self.operands, self.emitter, self.operands.ring_operand
        arriving = emitter.value(emitter.name(f"{kind}{number}.{axis}", side), operands.results(side), chunks)
        send = emitter.message(peers[0], self.group.accumulator_name(side, received(step)), kind, side, number)
        emitter.send_recv(axis, [send], [emitter.message(peers[1], arriving, kind, side, number)])
        for rows in operands.first_block if into == 0 else (received(into),):
            self.group.add_arriving(self.group.accumulator_name(side, rows), arriving)
