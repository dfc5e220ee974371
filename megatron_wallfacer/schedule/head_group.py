"""One head group at one rank: its values, tiles, accumulators and the exchange along the head axis.

All kinds of schedules use this class. Builders (:mod:`megatron_wallfacer.schedule.dense`,
:mod:`megatron_wallfacer.schedule.sparse`) add the transfers within teams and along the ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_wallfacer.schedule import ops
from megatron_wallfacer.schedule.emitter import OpEmitter
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.operands import SIDES, OperandRows, PassSpec, after
from megatron_wallfacer.schedule.ops import GATHERED, LOCAL, TEAM, TENSORS, RowSet
from megatron_wallfacer.schedule.tiles import tiles


class Blocks(Protocol):
    """The chunks of local, gathered and received rows, and the names of the received :class:`Value` objects."""

    def chunks(self, side: str, rows: RowSet) -> tuple[int, ...]:
        """Return the ids of the chunks in the given rows of an operand (``q`` or ``kv``), ascending."""

    def sources(self, tensors: str, side: str, rows: RowSet) -> Sequence[str]:
        """Return the names of the received values that together have the given rows of a tensor group."""


class HeadGroup:
    """Operations of one head group that dense and sparse schedules have in common.

    Attributes:
        keep_gathered_q: whether forward keeps the gathered queries for backward.
        merges_rows: whether local and gathered rows of the stationary operand are one block with one accumulator.
        keeps: names of the values that forward keeps for backward.
        given: names of the values that forward has kept and backward reads.
    """

    def __init__(
        self,
        spec: PassSpec,
        operands: OperandRows,
        emitter: OpEmitter,
        blocks: Blocks,
        *,
        keep_gathered_q: bool,
        merges_rows: bool = False,
    ) -> None:
        self.spec, self.operands, self.emitter, self.blocks = spec, operands, emitter, blocks
        self.keep_gathered_q, self.merges_rows = keep_gathered_q, merges_rows
        self.keeps: dict[str, None] = {}
        self.given: list[str] = []
        self._arriving: dict[str, list[str]] = {}
        self._heads = operands.grid.neighbours(operands.rank, "head")
        self._local_chunks = shard_chunks(operands.rank, operands.grid.cp_size)

    # --- rows ---

    def split_heads(self) -> None:
        """Create values for the local rows. With a head axis, send each rank of the axis the heads that it computes."""
        operands, emitter = self.operands, self.emitter
        for tensors in dict.fromkeys(group for side in SIDES for group in operands.tensor_groups(side)):
            name = emitter.name(LOCAL, tensors)
            if operands.grid.head == 1:
                emitter.program.append(ops.View(emitter.value(name, TENSORS[tensors], self._local_chunks, rows=LOCAL)))
            elif operands.backward and tensors != "dout":
                # Forward has kept the exchanged values. A second exchange would cost volume and save no memory.
                rows = operands.shard(operands.rank)
                self.given.append(emitter.value(name, TENSORS[tensors], rows, rows=LOCAL))
            else:
                self._split_heads(tensors, name)

    def _split_heads(self, tensors: str, name: str) -> None:
        emitter, payload, rank = self.emitter, TENSORS[tensors], self.operands.rank
        emitter.program.append(ops.View(emitter.value(f"{name}<{rank}", payload, self._local_chunks)))
        sends, receives = [], []
        for peer in after(rank, self._heads):
            sent = emitter.value(f"{name}>{peer}", payload, self._local_chunks, head_slice=self._head_slice(peer))
            emitter.program.append(ops.View(sent))
            chunks = shard_chunks(peer, self.operands.grid.cp_size)
            arriving = emitter.value(f"{name}<{peer}", payload, chunks)
            sends.append(emitter.message(peer, sent, "split", tensors))
            receives.append(emitter.message(peer, arriving, "split", tensors))
        emitter.send_recv("head", sends, receives)

    def rows(self, side: str, rows: RowSet) -> tuple[str, ...]:
        """Return the names of the values that contain the given rows of an operand. Define missing values."""
        return tuple(self.tensor_rows(tensors, side, rows) for tensors in self.operands.tensor_groups(side))

    def tensor_rows(self, tensors: str, side: str, rows: RowSet) -> str:
        """Return the name of the :class:`Value` for the given rows and tensors. Define it if it is missing."""
        emitter, name = self.emitter, self.emitter.name(rows, tensors)
        if name in emitter.values:
            return name
        keeps_queries = tensors == "q" and self.keep_gathered_q
        if rows == LOCAL:
            emitter.concat(name, [f"{name}<{peer}" for peer in self._heads], rows)
        elif rows == TEAM:
            local = self.tensor_rows(tensors, side, LOCAL)
            # Kept queries are one value. Other gathered values are read from the buffers in which they arrived.
            gathered = self.blocks.sources(tensors, side, GATHERED)
            if keeps_queries:
                gathered = [self.tensor_rows(tensors, side, GATHERED)]
            emitter.concat(name, [local, *gathered], rows)
        else:
            emitter.concat(name, self.blocks.sources(tensors, side, rows), rows)
        if not self.operands.backward and (rows == LOCAL or (keeps_queries and rows != TEAM)):
            self.keeps[name] = None
        return name

    # --- tiles ---

    def compute_tiles(
        self, stationary: RowSet, ring: RowSet, *, only: Sequence[int] | None = None, if_any: bool = False
    ) -> None:
        """Compute the tiles of some rows of the stationary operand against some rows of the ring operand.

        If ``only`` is given, the tiles cover only these query chunks. With ``if_any``, no operation is appended if
        every pair is masked.
        """
        operands = self.operands
        rows = {operands.stationary: stationary, operands.ring_operand: ring}
        names = {side: self.rows(side, rows[side]) for side in SIDES}
        q_chunks, k_chunks = (self.emitter.values[names[side][0]].chunks for side in SIDES)
        causal, chunk_mask = self.spec.causal, self.spec.chunk_mask
        unmasked = tiles(q_chunks, k_chunks, causal=causal, only=only, chunk_mask=chunk_mask)
        if if_any and not unmasked:
            return
        into = {side: self.accumulator(side, rows[side]) for side in SIDES if operands.results(side)}
        self.emitter.program.append(ops.Attend(names["q"], names["kv"], into["q"], into.get("kv"), unmasked))

    # --- accumulators ---

    def accumulator_name(self, side: str, rows: RowSet) -> str:
        """Return the name of the accumulator for some rows of an operand, whether the accumulator exists or not."""
        return self.emitter.name(f"{self._accumulated_rows(side, rows)}.acc", side)

    def accumulator(self, side: str, rows: RowSet) -> str:
        """Return the name of the accumulator for some rows of an operand, and create a missing accumulator."""
        name = self.accumulator_name(side, rows)
        if name not in self.emitter.values:
            chunks = self.blocks.chunks(side, self._accumulated_rows(side, rows))
            self.emitter.value(name, self.operands.results(side), chunks)
        return name

    def _accumulated_rows(self, side: str, rows: RowSet) -> RowSet:
        is_merged = self.merges_rows and side == self.operands.stationary and rows in (LOCAL, GATHERED)
        return TEAM if is_merged else rows

    def add_arriving(self, accumulator: str, source: str) -> None:
        """Register a value that arrives later, so that :meth:`accumulate` adds it to an accumulator."""
        self._arriving.setdefault(accumulator, []).append(source)

    def accumulate(self, accumulator: str) -> None:
        """Add all registered values to an accumulator. The operations wait until the values have arrived."""
        self.emitter.program += (ops.Accumulate(source, accumulator) for source in self._arriving.pop(accumulator, ()))

    # --- results ---

    def join_heads(self) -> None:
        """Add the results of local rows that other ranks have sent.

        With a head axis, send each rank the results of its tokens.
        """
        for side in SIDES:
            if self.operands.results(side):
                self.accumulate(self.accumulator(side, LOCAL))
                self._join_heads(side)

    def _join_heads(self, side: str) -> None:
        emitter, rank, cp_size = self.emitter, self.operands.rank, self.operands.grid.cp_size
        complete, sends, receives = self.accumulator_name(side, LOCAL), [], []
        for peer in after(rank, self._heads):
            name, payload = emitter.name(f"joined{peer}", side), self.operands.results(side)
            arriving = emitter.value(name, payload, self._local_chunks, head_slice=self._head_slice(peer))
            sends.append(emitter.message(peer, complete, "join", side, chunks=shard_chunks(peer, cp_size)))
            receives.append(emitter.message(peer, arriving, "join", side))
        emitter.send_recv("head", sends, receives)

    def write_results(self) -> None:
        """Write the results of local rows into the output tensors of the pass."""
        sides = [side for side in SIDES if self.operands.results(side)]
        peers = after(self.operands.rank, self._heads)
        joined = [self.emitter.name(f"joined{peer}", side) for side in sides for peer in peers]
        self.emitter.program.append(ops.WriteResult((*(self.accumulator_name(side, LOCAL) for side in sides), *joined)))

    def _head_slice(self, rank: int) -> int:
        return self.operands.grid.coordinates(rank)["head"] * self.emitter.groups + self.emitter.group
