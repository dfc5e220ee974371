"""Schedules for sparse masks: windows, and documents in a sequence. Such a mask leaves many chunk pairs empty.

The grid decides which rank computes which pairs. A block that hops around the ring would reach many ranks that need
none of its rows. With a sparse mask the ring is not used. Each rank receives exactly the chunks that it needs, directly
from the ranks that have these chunks, and sends results back directly. Chunks that no query sees are neither sent nor
computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_wallfacer.schedule.emitter import OpEmitter
from megatron_wallfacer.schedule.head_group import HeadGroup
from megatron_wallfacer.schedule.mask import ChunkMask
from megatron_wallfacer.schedule.operands import OperandRows, PassSpec, after
from megatron_wallfacer.schedule.ops import GATHERED, LOCAL, TENSORS, RowSet, received
from megatron_wallfacer.schedule.ring import block_holder, block_origin

#: Number of ring steps between the exchange of rows and their use.
AHEAD = 2

ChunksByRank = dict[int, tuple[int, ...]]


class NeededBlocks:
    """The rows that one rank needs from another rank, for all pairs of ranks.

    In each ring step a rank uses the block of one team. Ring steps use blocks in the order of a one-way ring.
    """

    def __init__(self, operands: OperandRows, emitter: OpEmitter, chunk_mask: ChunkMask) -> None:
        self._operands, self._emitter, self._chunk_mask = operands, emitter, chunk_mask
        self._needed: dict[tuple[int, str], frozenset[int]] = {}

    def chunks(self, side: str, rows: RowSet) -> tuple[int, ...]:
        """See :meth:`megatron_wallfacer.schedule.head_group.Blocks.chunks`."""
        if rows == LOCAL:
            return self._operands.chunks(side, rows)
        return tuple(sorted(chunk for chunks in self.senders(side, rows).values() for chunk in chunks))

    def sources(self, tensors: str, side: str, rows: RowSet) -> list[str]:
        """See :meth:`megatron_wallfacer.schedule.head_group.Blocks.sources`."""
        return [self.received_name(tensors, rows, rank) for rank in self.senders(side, rows)]

    def received_name(self, tensors: str, rows: RowSet, rank: int) -> str:
        """Return the name of the value that this rank receives from ``rank``."""
        return self._emitter.name(f"{rows}from{rank}", tensors)

    def senders(self, side: str, rows: RowSet) -> ChunksByRank:
        """Return the ranks that send the given rows to this rank, with the chunk ids that each rank sends."""
        operands = self._operands
        ranks: Iterable[int] = after(operands.rank, operands.team(side))
        if rows != GATHERED:
            ranks = self._rotated(operands.team(side, block_origin(operands.grid, operands.rank, rows.step)))
        return {rank: needed for rank in ranks if (needed := self._needed_of(rank, operands.rank, side))}

    def receivers(self, side: str, rows: RowSet) -> ChunksByRank:
        """Return the ranks to which this rank sends local rows, with the chunks that each of them receives."""
        operands, grid = self._operands, self._operands.grid
        ranks: Iterable[int] = after(operands.rank, operands.team(side))
        if rows != GATHERED:
            team = self._rotated(operands.team(side))
            ranks = (block_holder(grid, member, block_origin(grid, member, rows.step)) for member in team)
        return {rank: needed for rank in ranks if (needed := self._needed_of(operands.rank, rank, side))}

    def _rotated(self, team: Sequence[int]) -> tuple[int, ...]:
        """Return a team in an order that differs between ranks, so that ranks begin with different peers."""
        operands = self._operands
        position = operands.team(operands.ring_operand).index(operands.rank)
        return (*team[position:], *team[:position])

    def _needed_of(self, owner: int, rank: int, side: str) -> tuple[int, ...]:
        needed = self._needed_chunks(rank, side)
        return tuple(chunk for chunk in self._operands.shard(owner) if chunk in needed)

    def _needed_chunks(self, rank: int, side: str) -> frozenset[int]:
        """Return the chunks of an operand for which ``rank`` computes at least one unmasked pair."""
        if (rank, side) not in self._needed:
            q_chunks, k_chunks = self._assigned(rank, "q"), self._assigned(rank, "kv")
            seen = self._chunk_mask.nonempty
            if side == "q":
                needed = (c for c in q_chunks if any(seen[c][0] <= k < seen[c][1] for k in k_chunks))
            else:
                seen_by_any = {k for c in q_chunks for k in range(*seen[c])}
                needed = (k for k in k_chunks if k in seen_by_any)
            self._needed[rank, side] = frozenset(needed)
        return self._needed[rank, side]

    def _assigned(self, rank: int, side: str) -> tuple[int, ...]:
        """Return the chunks of an operand that the grid assigns to a rank, without regard to the mask."""
        operands = self._operands
        if side == operands.stationary:
            return operands.block(operands.team(side, rank))
        origins = (block_origin(operands.grid, rank, step) for step in range(operands.grid.ring))
        return operands.block(member for origin in origins for member in operands.team(side, origin))


class SparseHeadGroupBuilder:
    """Builder that appends the operations of one head group for a sparse mask."""

    def __init__(self, spec: PassSpec, emitter: OpEmitter) -> None:
        assert spec.chunk_mask is not None
        self.operands = OperandRows(spec.plan, spec.rank, backward=spec.backward)
        self.blocks = NeededBlocks(self.operands, emitter, spec.chunk_mask)
        # If forward and backward have different ring operands, they gather different queries.
        keep_gathered_q = spec.keep_gathered_q and spec.plan.forward == spec.plan.backward
        self.group = HeadGroup(spec, self.operands, emitter, self.blocks, keep_gathered_q=keep_gathered_q)
        self._stationary_gathers = len(self.operands.team(self.operands.stationary)) > 1

    # --- inputs ---

    @property
    def ring_rows(self) -> tuple[RowSet, ...]:
        """Return the row sets of the ring operand that come from other ranks, in the order of their use."""
        gathered = (GATHERED,) if len(self.operands.team(self.operands.ring_operand)) > 1 else ()
        return (*gathered, *(received(step) for step in range(1, self.operands.grid.ring)))

    def exchange_stationary(self) -> None:
        """Gather the rows of the stationary operand that other ranks of the team have."""
        if self._stationary_gathers:
            for tensors in self.operands.tensor_groups(self.operands.stationary):
                self._exchange(tensors, self.operands.stationary, GATHERED)

    def exchange_ring(self, index: int) -> None:
        """Exchange the rows in entry ``index`` of :attr:`ring_rows`, unless ``index`` is past the end."""
        for rows in self.ring_rows[index : index + 1]:
            for tensors in self.operands.tensor_groups(self.operands.ring_operand):
                self._exchange(tensors, self.operands.ring_operand, rows)

    def _axis(self, side: str, rows: RowSet) -> str:
        """Return the axis along which rows are sent: the team's axis for gathered rows, else ``cp`` (all ranks)."""
        return self.operands.axis(side) if rows == GATHERED else "cp"

    def _exchange(self, tensors: str, side: str, rows: RowSet) -> None:
        group, emitter = self.group, self.group.emitter
        senders = self.blocks.senders(side, rows)
        if tensors == "q" and group.keep_gathered_q and self.operands.backward:
            # The ranks that would send these queries omit the messages by the same condition.
            if senders:
                name = emitter.name(rows, tensors)
                chunks = self.blocks.chunks(side, rows)
                group.given.append(emitter.value(name, TENSORS[tensors], chunks, rows=rows))
            return
        local, receivers = group.tensor_rows(tensors, side, LOCAL), self.blocks.receivers(side, rows)
        sends = [
            emitter.message(rank, local, "gather", tensors, rows.step, chunks) for rank, chunks in receivers.items()
        ]
        receives = []
        for rank, chunks in senders.items():
            name = emitter.value(self.blocks.received_name(tensors, rows, rank), TENSORS[tensors], chunks)
            receives.append(emitter.message(rank, name, "gather", tensors, rows.step))
        emitter.send_recv(self._axis(side, rows), sends, receives)

    # --- tiles and results ---

    def compute_tiles(self, ring: RowSet, *, stationary: RowSet) -> None:
        """Compute the tiles of ``ring`` rows against ``stationary`` rows, unless the mask leaves no pairs."""
        operands = self.operands
        if ring != LOCAL and not self.blocks.senders(operands.ring_operand, ring):
            return
        if stationary == GATHERED and not (
            self._stationary_gathers and self.blocks.senders(operands.stationary, GATHERED)
        ):
            return
        # Local tiles create the accumulators. A rank with only padding needs them too, because it returns zeros.
        self.group.compute_tiles(stationary, ring, if_any=(stationary, ring) != (LOCAL, LOCAL))

    def return_ring_results(self, rows: RowSet) -> None:
        """Send results of the ring operand to the origin ranks of its rows, and receive results of local rows."""
        if self.operands.results(self.operands.ring_operand):
            self._return_results(self.operands.ring_operand, rows)

    def return_stationary_results(self) -> None:
        """Send results of gathered stationary rows to their origin ranks, and receive results of local rows."""
        if self.operands.results(self.operands.stationary) and self._stationary_gathers:
            self._return_results(self.operands.stationary, GATHERED)

    def _return_results(self, side: str, rows: RowSet) -> None:
        group, emitter = self.group, self.group.emitter
        into, sends, receives = group.accumulator(side, LOCAL), [], []
        for rank, chunks in self.blocks.senders(side, rows).items():
            source = group.accumulator(side, rows)
            sends.append(emitter.message(rank, source, "return", side, rows.step, chunks))
        for rank, chunks in self.blocks.receivers(side, rows).items():
            arriving = emitter.value(emitter.name(f"{rows}back{rank}", side), self.operands.results(side), chunks)
            receives.append(emitter.message(rank, arriving, "return", side, rows.step))
            group.add_arriving(into, arriving)
        emitter.send_recv(self._axis(side, rows), sends, receives)


def append_sparse(builders: Sequence[SparseHeadGroupBuilder]) -> None:
    """Append all operations: exchanges, then local tiles, then tiles of received rows in the order of ring steps."""
    for builder in builders:
        builder.group.split_heads()
        builder.exchange_stationary()
        for index in range(AHEAD):
            builder.exchange_ring(index)
    # No rank waits for local tiles. The first head group computes them while its inputs arrive. Each later head group
    # computes them while the results of its predecessor are sent.
    builders[0].compute_tiles(LOCAL, stationary=LOCAL)
    for index, builder in enumerate(builders):
        _compute_received(builder)
        if index:
            builders[index - 1].group.join_heads()
            builder.compute_tiles(LOCAL, stationary=LOCAL)
    builders[-1].group.join_heads()
    for builder in builders:
        builder.group.write_results()


def _compute_received(builder: SparseHeadGroupBuilder) -> None:
    builder.compute_tiles(LOCAL, stationary=GATHERED)
    for index, rows in enumerate(builder.ring_rows):
        builder.exchange_ring(index + AHEAD)
        builder.compute_tiles(rows, stationary=GATHERED)
        builder.compute_tiles(rows, stationary=LOCAL)
        builder.return_ring_results(rows)
    builder.return_stationary_results()
