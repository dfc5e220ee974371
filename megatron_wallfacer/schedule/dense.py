"""The operations of one head group, in schedules in which blocks of the ring operand hop around the ring.

:mod:`megatron_wallfacer.schedule.schedule` decides in which order :class:`HeadGroupBuilder` appends them.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_wallfacer.schedule.emitter import OpEmitter
from megatron_wallfacer.schedule.head_group import HeadGroup
from megatron_wallfacer.schedule.merging import merges_rows, ranks_per_call
from megatron_wallfacer.schedule.operands import OperandRows, PassSpec, after
from megatron_wallfacer.schedule.ops import GATHERED, LOCAL, TEAM, RowSet
from megatron_wallfacer.schedule.paper_transfers import PaperTransfers
from megatron_wallfacer.schedule.ring_transfers import RingTransfers
from megatron_wallfacer.schedule.team_transfers import TeamTransfers


class TeamBlocks:
    """Blocks that contain the rows of all ranks of a team."""

    def __init__(self, operands: OperandRows, emitter: OpEmitter) -> None:
        self._operands, self._emitter = operands, emitter

    def chunks(self, side: str, rows: RowSet) -> tuple[int, ...]:
        """See :meth:`megatron_wallfacer.schedule.head_group.Blocks.chunks`."""
        return self._operands.chunks(side, rows)

    def sources(self, tensors: str, side: str, rows: RowSet) -> list[str]:
        """Return the names of the values that are gathered from the other ranks of the team."""
        peers = after(self._operands.rank, self._operands.team(side))
        return [self._emitter.name(f"from{peer}", tensors) for peer in peers]


class HeadGroupBuilder:
    """Builder that appends the operations of one head group to a schedule."""

    def __init__(self, spec: PassSpec, emitter: OpEmitter) -> None:
        plan = self.plan = spec.plan
        self.operands = OperandRows(plan, spec.rank, backward=spec.backward)
        # In the permuted order pass-Q gathers queries of other ranks than the team.
        is_gathered_elsewhere = plan.kv_order == "permuted" and "pass-q" in (plan.forward, plan.backward)
        self.group = HeadGroup(
            spec,
            self.operands,
            emitter,
            TeamBlocks(self.operands, emitter),
            keep_gathered_q=spec.keep_gathered_q and not is_gathered_elsewhere,
            merges_rows=merges_rows(self.operands, emitter.groups),
        )
        self.teams, self.ring = TeamTransfers(self.group), RingTransfers(self.group)
        self.paper = PaperTransfers(self.teams)

    # --- inputs ---

    def start_inner_ring(self) -> None:
        """Start sending the local block of the ring operand around the inner ring."""
        if len(self.operands.first_pass) > 1:
            self.ring.start_hops(0, "ring_inner")

    def start_transfers(self) -> None:
        """Gather rows of the stationary operand, then of the ring operand, and start the hops of the ring operand."""
        operands = self.operands
        for tensors in operands.tensor_groups(operands.stationary):
            self.teams.gather(tensors, operands.stationary)
        for tensors in operands.tensor_groups(operands.ring_operand):
            if operands.is_permuted:
                self.paper.enter(tensors)
            else:
                self.teams.gather(tensors, operands.ring_operand)
        if operands.first_block == (LOCAL,):
            self.ring.start_hops(0, *(("ring_outer",) if len(operands.first_pass) > 1 else ()))

    # --- tiles ---

    def compute_stationary(self, ring: RowSet, *, local: bool) -> None:
        """Compute tiles of the gathered rows and, if ``local``, of the local rows of the stationary operand."""
        operands = self.operands
        if local and self.group.merges_rows:
            self.group.compute_tiles(TEAM, ring)
            return
        # Local rows need not wait for a gather. But if results of gathered rows stay at this rank until the end of the
        # ring, computing gathered rows first lets the rank return these results sooner.
        results_move = operands.results(operands.ring_operand)
        for rows in operands.stationary_rows if results_move else reversed(operands.stationary_rows):
            if rows == GATHERED:
                self.compute_gathered(ring)
            elif local:
                self.group.compute_tiles(LOCAL, ring)

    def compute_gathered(self, ring: RowSet, ranks: Sequence[int] = ()) -> None:
        """Compute tiles of stationary rows gathered from ``ranks``, by default from all other ranks of the team."""
        operands = self.operands
        chunks = operands.block(ranks or after(operands.rank, operands.team(operands.stationary)))
        if self.group.merges_rows:
            self.group.compute_tiles(TEAM, ring, only=chunks)
        else:
            self.group.compute_tiles(GATHERED, ring, only=chunks if ranks else None)

    def compute_last_gathered(self, ring: RowSet) -> None:
        """Compute the last tiles of gathered rows, against ``ring``. After each attention call, send back results."""
        stationary = self.operands.stationary
        if stationary != "q":
            self.compute_gathered(ring)
        for ranks in self._returns() if self.operands.results(stationary) else ():
            if stationary == "q":
                self.compute_gathered(ring, ranks)
            self.teams.scatter(stationary, ranks)

    def _returns(self) -> list[tuple[int, ...]]:
        peers = after(self.operands.rank, self.operands.team(self.operands.stationary))
        each = ranks_per_call(self.plan, self.group.emitter.groups) if self.group.merges_rows else 1
        return [peers[first : first + each] for first in range(0, len(peers), each)]

    # --- results ---

    def return_results(self, side: str) -> None:
        """Send results of gathered or received rows to their origin ranks, and receive results of local rows."""
        operands = self.operands
        if not operands.results(side):
            return
        if operands.is_permuted and side == operands.ring_operand:
            self.paper.leave()
        else:
            for peer in after(operands.rank, operands.team(side)):
                self.teams.scatter(side, [peer])
