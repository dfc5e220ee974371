"""The operands of attention at one rank: the rows of Q and of K/V in each ring step.

The *ring operand* is passed around the ring: K and V (pass-KV), or Q (pass-Q). The operand that is not passed is
*stationary*. A rank has *local* rows of both operands. *Gathered* rows come from other ranks of the same team. They are
rows of the stationary operand, or of the first block of the ring operand. *Received* rows are rows of the ring operand
from other positions of the ring. If ``kv_order`` is not ``native``, the first block is received too.

Tensors that are sent together form a *tensor group*. The tensor groups are ``q``, ``kv`` and, in backward, ``dout``
with its statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_wallfacer.schedule.layout import block_chunks
from megatron_wallfacer.schedule.mask import ChunkMask
from megatron_wallfacer.schedule.ops import DKV, DQ, GATHERED, LOCAL, PARTIAL_OUT, TEAM, RowSet, received
from megatron_wallfacer.schedule.paper_order import entering, team_of
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.ring import ring_steps

AXIS = {"q": "team", "kv": "kv_team"}
SIDES = ("q", "kv")


@dataclass(frozen=True)
class PassSpec:
    """One pass on one rank: the arguments of :func:`megatron_wallfacer.schedule.schedule.forward_schedule`."""

    plan: Plan
    rank: int
    backward: bool
    causal: bool = True
    groups: int = 1
    keep_gathered_q: bool = False
    chunk_mask: ChunkMask | None = None


class OperandRows:
    """The rows of both operands at one rank in one pass. The argument ``side`` names an operand, ``q`` or ``kv``.

    Attributes:
        ring_operand: operand that is passed around the ring.
        stationary: operand that stays on the rank.
        is_permuted: whether teams exchange their blocks of the ring operand before the ring starts, as in the paper.
        ring_steps: ring steps in the order of their computation.
    """

    def __init__(self, plan: Plan, rank: int, *, backward: bool) -> None:
        self.plan, self.grid, self.rank, self.backward = plan, plan.grid, rank, backward
        self.ring_operand = plan.ring_operand(backward=backward)
        self.stationary = "q" if self.ring_operand == "kv" else "kv"
        self.is_permuted = plan.kv_order != "native"
        self.ring_steps = ring_steps(self.grid, rank, bidirectional=plan.bidirectional)
        self._shards: dict[int, tuple[int, ...]] = {}
        self._teams: dict[tuple[str, int], tuple[int, ...]] = {}

    # --- tensors ---

    def tensor_groups(self, side: str) -> tuple[str, ...]:
        """Return the names of an operand's tensor groups. The tensors of a group are sent in one message."""
        return ("q", "dout") if side == "q" and self.backward else (side,)

    def results(self, side: str) -> tuple[str, ...]:
        """Return the names of an operand's result tensors: gradients in backward; in forward, out and lse for ``q``."""
        if self.backward:
            return DKV if side == "kv" else DQ
        return PARTIAL_OUT if side == "q" else ()

    # --- ranks and chunks ---

    def shard(self, rank: int) -> tuple[int, ...]:
        """Return the chunk ids of a rank after the head exchange: those of all ranks along its head axis."""
        if rank not in self._shards:
            self._shards[rank] = block_chunks(self.grid.neighbours(rank, "head"), self.grid.cp_size)
        return self._shards[rank]

    def block(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """Return the chunks of the shards of several ranks, ascending."""
        return tuple(sorted(chunk for rank in ranks for chunk in self.shard(rank)))

    def team(self, side: str, rank: int | None = None) -> tuple[int, ...]:
        """Return the team of ``rank`` (default: this rank) for an operand: all ranks that gather the same rows."""
        rank = self.rank if rank is None else rank
        if (side, rank) not in self._teams:
            team = team_of(self.grid, rank) if self.is_permuted else self.grid.neighbours(rank, AXIS[side])
            self._teams[side, rank] = team
        return self._teams[side, rank]

    def axis(self, side: str) -> str:
        """Return the grid axis along which the ranks of an operand's team differ."""
        return "team" if self.is_permuted else AXIS[side]

    def block_of(self, origin: int) -> tuple[int, ...]:
        """Return the chunk ids of the ring operand's block that rank ``origin`` has in ring step 0."""
        return self.block(entering(self.grid, origin)[1] if self.is_permuted else self.team(self.ring_operand, origin))

    def chunks(self, side: str, rows: RowSet) -> tuple[int, ...]:
        """Return the ids of the chunks in some rows of an operand, ascending."""
        if rows == LOCAL:
            return self.shard(self.rank)
        if rows == GATHERED:
            return self.block(rank for rank in self.team(side) if rank != self.rank)
        if rows == TEAM:
            return self.block(self.team(side))
        return self.block_of(self.ring_steps[rows.step].origin)

    # --- row sets ---

    @property
    def first_block(self) -> tuple[RowSet, ...]:
        """Return the row sets of the first block of the ring operand.

        With ``permuted`` order the first block is received from another rank.
        """
        if self.is_permuted:
            return (received(0),)
        return (LOCAL, GATHERED) if len(self.team(self.ring_operand)) > 1 else (LOCAL,)

    @property
    def stationary_rows(self) -> tuple[RowSet, ...]:
        """Return the row sets of the stationary operand: local, and gathered if the team has several ranks."""
        return (LOCAL, GATHERED) if len(self.team(self.stationary)) > 1 else (LOCAL,)

    @property
    def merged_steps(self) -> int:
        """Return the number of ring steps that can compute local and gathered rows in a single attention call.

        Gathered rows have arrived before such a step. Results of the stationary operand are sent only after later
        steps.
        """
        if self.results(self.ring_operand):
            return len(self.later_steps)
        return len(self.first_block) - 1 + len(self.ring_steps) - len(self.first_pass) - len(self.last_pass)

    # --- passes of the inner ring ---

    @property
    def _pass_steps(self) -> int:
        """Return the number of ring steps between two hops of the outer ring; 1 on a single ring."""
        double = self.grid.ring_inner > 1 and self.grid.ring_outer > 1
        return self.grid.ring_inner if double else 1

    @property
    def first_pass(self) -> tuple[RowSet, ...]:
        """Return the local and received rows of the first pass of the inner ring, without gathered rows."""
        if self.is_permuted:
            return ()
        steps = self._pass_steps if self.first_block == (LOCAL,) else 1
        return (LOCAL, *(received(step) for step in range(1, steps)))

    @property
    def later_steps(self) -> tuple[RowSet, ...]:
        """Return the received rows of all ring steps after the first round of the inner ring."""
        return tuple(received(step) for step in range(len(self.first_pass), len(self.ring_steps)))

    @property
    def last_pass(self) -> tuple[RowSet, ...]:
        """Return the rows that arrive in the last round of the inner ring; without a ring, rows of the only block."""
        first = max(1, len(self.ring_steps) - self._pass_steps)
        return tuple(received(step) for step in range(first, len(self.ring_steps))) or self.first_block[-1:]

    def starts_pass(self, step: int) -> bool:
        """Return whether a round of the inner ring of a double ring starts with ring step ``step``."""
        return self._pass_steps > 1 and step % self._pass_steps == 0 and step < len(self.ring_steps)

    def pass_start(self, step: int) -> int | None:
        """Return the first ring step of the inner ring's current round; None in the first round or on a single ring."""
        return step - step % self._pass_steps or None if self._pass_steps > 1 else None


def after(rank: int, ranks: Sequence[int]) -> tuple[int, ...]:
    """Return all other ranks, from the one after ``rank`` on, so that every rank begins with a different peer."""
    position = ranks.index(rank)
    return (*ranks[position + 1 :], *ranks[:position])


def opposite_pairs(rank: int, ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Return (destination, source) pairs: for i = 1, 2, ..., the ranks i positions after and i before ``rank``."""
    others = after(rank, ranks)
    return list(zip(others, reversed(others), strict=True))
