"""Transfers into the paper's arrangement of blocks before the ring starts, and out of it after the ring has ended."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_wallfacer.schedule.operands import after, opposite_pairs
from megatron_wallfacer.schedule.ops import GATHERED, LOCAL, TENSORS, Accumulate, RowSet, received
from megatron_wallfacer.schedule.paper_order import entering, target
from megatron_wallfacer.schedule.team_transfers import TeamTransfers


class PaperTransfers:
    """Transfers of one head group that permute the blocks of the ring operand."""

    def __init__(self, teams: TeamTransfers) -> None:
        self.teams, self.group = teams, teams.group
        self.operands, self.emitter = teams.operands, teams.emitter
        self.is_gathered_first = self.operands.plan.kv_order == "paper"

    def enter(self, tensors: str) -> None:
        """Send the local rows of the ring operand to the ranks that need them in ring step 0."""
        operands, emitter, grid = self.operands, self.emitter, self.operands.grid
        side, rows = operands.ring_operand, received(0)
        local, block = self.group.tensor_rows(tensors, side, LOCAL), emitter.name(rows, tensors)
        origin, team = entering(grid, operands.rank)
        if self.is_gathered_first:
            self.teams.gather(tensors, side)
            gathered = () if len(team) == 1 else (self.group.tensor_rows(tensors, side, GATHERED),)
            whole = emitter.concat(emitter.name("first", tensors), [local, *gathered])
            self._permute("entry", tensors, whole, block, operands.block(team), origin, rows)
            return
        shard = emitter.name("entered", tensors)
        self._permute("entry", tensors, local, shard, operands.shard(origin), origin)
        ranks = grid.neighbours(operands.rank, "kv_team")
        chunks = {peer: operands.shard(entering(grid, peer)[0]) for peer in ranks}
        self.teams.exchange("regather", tensors, "kv_team", shard, chunks)
        arrived = [emitter.name(f"from{peer}", tensors) for peer in after(operands.rank, ranks)]
        emitter.concat(block, [shard, *arrived], rows)

    def leave(self) -> None:
        """Send the results of the first block back to the origin ranks of its rows."""
        operands, emitter, side = self.operands, self.emitter, self.operands.ring_operand
        total = self.group.accumulator(side, received(0))
        self.group.accumulate(total)
        origin, exited = entering(operands.grid, operands.rank)[0], emitter.name("exited", side)
        complete, chunks = total, operands.block(operands.team(side))
        if not self.is_gathered_first:
            complete, chunks = self._reduced_shard(side, total, operands.shard(origin)), operands.shard(operands.rank)
        self._permute("exit", side, complete, exited, chunks, origin)
        self.group.add_arriving(self.group.accumulator(side, LOCAL), exited)
        if self.is_gathered_first:
            for peer in after(operands.rank, operands.team(side)):
                self.teams.scatter(side, [peer], exited)

    def _reduced_shard(self, side: str, total: str, chunks: tuple[int, ...]) -> str:
        """Sum the results of a shard over the ranks that had it in ring step 0. Return the name of the accumulator."""
        operands, emitter = self.operands, self.emitter
        shard = emitter.value(emitter.name("leaving.acc", side), operands.results(side), chunks)
        emitter.program.append(Accumulate(total, shard))
        ranks = operands.grid.neighbours(operands.rank, "kv_team")
        for destination, source in opposite_pairs(operands.rank, ranks):
            sent = operands.shard(entering(operands.grid, destination)[0])
            self.teams.return_rows("unenter", side, "kv_team", total, shard, [(destination, source, sent)], chunks)
        self.group.accumulate(shard)
        return shard

    def _permute(
        self,
        kind: str,
        tensors: str,
        source: str,
        into: str,
        chunks: Sequence[int],
        origin: int,
        rows: RowSet | None = None,
    ) -> None:
        """Send rows to one rank, and receive rows from one rank. ``entry`` sends inputs, and ``exit`` sends results."""
        emitter, own_target = self.emitter, target(self.operands.grid, self.operands.rank)
        if own_target == self.operands.rank:
            emitter.concat(into, [source], rows)
            return
        enters = kind == "entry"
        destination, sender = (own_target, origin) if enters else (origin, own_target)
        emitter.value(into, TENSORS[tensors] if enters else self.operands.results(tensors), chunks, rows=rows)
        sends = [emitter.message(destination, source, kind, tensors)]
        emitter.send_recv("cp", sends, [emitter.message(sender, into, kind, tensors)])
