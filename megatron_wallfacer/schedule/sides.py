"""The two sides of the square as one rank sees them: whose rows it has when, and what is made of them.

One side, the *rider*, moves around the ring; the other, the *resident*, stays. A rank has its *own* rows of both sides;
of the resident, and of the rider's first block, it gathers *others'* rows from its teams; other blocks *visit*.

Rows come in *bundles* of tensors that travel together: ``q``, ``kv``, and in backward ``dout`` with its statistics.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_wallfacer.schedule import ops
from megatron_wallfacer.schedule.layout import block_chunks
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.published import entering, team_of
from megatron_wallfacer.schedule.ring import visits

TENSORS = {"q": ops.Q, "kv": ops.KV, "dout": ops.DOUT}
AXIS = {"q": "team", "kv": "kv_team"}
#: Whose rows: the rank's own, its teams', or those that visit. ALL: local and gathered rows of one side as one block.
OWN, OTHERS, ALL = "own", "others", "all"


def at(visit: int) -> str:
    """Whose rows: those of a visit."""
    return f"visit{visit}"


def visit_number(whose: str) -> int:
    """The visit that :func:`at` names."""
    return int(whose.removeprefix("visit"))


class Sides:
    """What a rank has of the two sides in one pass.

    Args:
        plan: grid and choices.
        rank: index in the context-parallel group.
        backward: the gradient pass.

    Attributes:
        rider, resident: ``q`` or ``kv``.
        published: blocks are the paper's, not those of the rank's own teams.
        visits: the rider's blocks in order.
    """

    def __init__(self, plan: Plan, rank: int, *, backward: bool) -> None:
        self.plan, self.grid, self.rank, self.backward = plan, plan.grid, rank, backward
        self.rider = plan.backward if backward else plan.forward
        self.resident = "q" if self.rider == "kv" else "kv"
        self.published = plan.kv_order != "native"
        self.visits = visits(self.grid, rank, bidirectional=plan.bidirectional)
        self._shards: dict[int, tuple[int, ...]] = {}
        self._teams: dict[tuple[str, int], tuple[int, ...]] = {}

    def bundles(self, side: str) -> tuple[str, ...]:
        """Bundles that the tiles read of a side."""
        return ("q", "dout") if side == "q" and self.backward else (side,)

    def results(self, side: str) -> tuple[str, ...]:
        """Tensors that the tiles make for a side."""
        if self.backward:
            return ops.DKV if side == "kv" else ops.DQ
        return ops.PARTIAL_OUT if side == "q" else ()

    def shard(self, rank: int) -> tuple[int, ...]:
        """Chunks that a rank has after the exchange along ``head``: those of all ranks that share its tokens."""
        if rank not in self._shards:
            self._shards[rank] = block_chunks(self.grid.neighbours(rank, "head"), self.grid.cp_size)
        return self._shards[rank]

    def block(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """Chunks of several ranks' shards."""
        return tuple(sorted(chunk for rank in ranks for chunk in self.shard(rank)))

    def team(self, side: str, of: int | None = None) -> tuple[int, ...]:
        """The ranks that gather each other's rows of a side."""
        rank = self.rank if of is None else of
        if (side, rank) not in self._teams:
            team = team_of(self.grid, rank) if self.published else self.grid.neighbours(rank, AXIS[side])
            self._teams[side, rank] = team
        return self._teams[side, rank]

    def axis(self, side: str) -> str:
        """The axis along which a side's team stands."""
        return "team" if self.published else AXIS[side]

    @property
    def home_parts(self) -> tuple[str, ...]:
        """Whose rows the rider's first block has; in the published order it is a visitor from the start."""
        if self.published:
            return (at(0),)
        return (OWN, OTHERS) if len(self.team(self.rider)) > 1 else (OWN,)

    @property
    def resident_parts(self) -> tuple[str, ...]:
        """Whose rows the resident has."""
        return (OWN, OTHERS) if len(self.team(self.resident)) > 1 else (OWN,)

    @property
    def merged_steps(self) -> int:
        """Ring steps in which local and gathered rows may be computed together: both are here, none is sent home."""
        if self.results(self.rider):
            return len(self.far_visits)
        return len(self.home_parts) - 1 + len(self.visits) - len(self.home_turn) - len(self.last_turn)

    @property
    def _turn(self) -> int:
        """Visits of a turn of the inner ring, where there are several turns; else one, each visit its own."""
        double = self.grid.ring_inner > 1 and self.grid.ring_outer > 1
        return self.grid.ring_inner if double else 1

    @property
    def home_turn(self) -> tuple[str, ...]:
        """What of the rider is at home or comes from the inner ring of home; nothing where it must be waited for."""
        if self.published:
            return ()
        inner = self._turn if self.home_parts == (OWN,) else 1
        return (OWN, *(at(visit) for visit in range(1, inner)))

    @property
    def far_visits(self) -> tuple[str, ...]:
        """The visits that are not of the home turn."""
        return tuple(at(visit) for visit in range(len(self.home_turn), len(self.visits)))

    @property
    def last_turn(self) -> tuple[str, ...]:
        """The last visits, those of one turn; at home, if there are no others."""
        last = tuple(at(visit) for visit in range(max(1, len(self.visits) - self._turn), len(self.visits)))
        return last or self.home_parts[-1:]

    def is_turn_start(self, visit: int) -> bool:
        """The block of this visit stays for a turn of the inner ring, and what it sums comes back here."""
        return self._turn > 1 and visit % self._turn == 0 and visit < len(self.visits)

    def turn_start(self, visit: int) -> int | None:
        """The first visit of a turn, if it has results to send on."""
        return visit - visit % self._turn or None if self._turn > 1 else None

    def block_of(self, origin: int) -> tuple[int, ...]:
        """Chunks of the rider's block that is at an origin when it starts its turn."""
        return self.block(entering(self.grid, origin)[1] if self.published else self.team(self.rider, origin))

    def chunks(self, side: str, whose: str) -> tuple[int, ...]:
        """Chunks of some rows of a side."""
        if whose == OWN:
            return self.shard(self.rank)
        if whose == OTHERS:
            return self.block(rank for rank in self.team(side) if rank != self.rank)
        if whose == ALL:
            return self.block(self.team(side))
        return self.block_of(self.visits[visit_number(whose)].origin)
