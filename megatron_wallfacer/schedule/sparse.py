"""Schedules for masks that leave much of the square dead: windows, and documents in a sequence.

Who computes which pairs is as the grid says. But a block that hops from rank to rank passes many to whom it is of no
use, so here nothing hops: every rank is sent what it will use of each block by the ranks that have it at home, and
sends what it computed for others' rows straight home. Chunks that nobody sees are neither sent nor computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from megatron_wallfacer.schedule.lane import Lane, after
from megatron_wallfacer.schedule.mask import Pattern
from megatron_wallfacer.schedule.ops import Attend
from megatron_wallfacer.schedule.ring import host_of, origin_of
from megatron_wallfacer.schedule.sides import OTHERS, OWN, TENSORS, at, visit_number

#: By how many visits a block is sent for before it is used.
AHEAD = 2


class SparseLane(Lane):
    """One head group on one rank, where a pattern says what is live; arguments as for a lane.

    The blocks of visits are the teams' of the ranks along the ring, in the order of a ring in one direction.
    """

    def __init__(self, *args: Any, pattern: Pattern, q_kept: bool, **kwargs: Any) -> None:
        super().__init__(*args, pattern=pattern, q_kept=False, **kwargs)
        self.merges_rows = False
        # What is gathered of the team's queries depends on what rides.
        self.q_kept = q_kept and self.plan.forward == self.plan.backward
        self._uses: dict[tuple[int, str], frozenset[int]] = {}

    # --- who uses what ---

    def uses(self, rank: int, side: str) -> frozenset[int]:
        """Chunks of a side that a rank computes something with."""
        if (rank, side) not in self._uses:
            other = self._assigned(rank, "kv" if side == "q" else "q")
            live = self.pattern.live
            if side == "q":
                found = (c for c in self._assigned(rank, "q") if any(live[c][0] <= k < live[c][1] for k in other))
            else:
                seen = {k for c in other for k in range(*live[c])}
                found = (k for k in self._assigned(rank, "kv") if k in seen)
            self._uses[rank, side] = frozenset(found)
        return self._uses[rank, side]

    def _assigned(self, rank: int, side: str) -> tuple[int, ...]:
        """Chunks of a side that a rank meets, whatever is live."""
        if side == self.resident:
            return self.block(self.team(side, rank))
        origins = (origin_of(self.grid, rank, visit) for visit in range(self.grid.ring))
        return self.block(member for origin in origins for member in self.team(side, origin))

    def _used_of(self, member: int, rank: int, side: str) -> tuple[int, ...]:
        """What a rank uses of another's rows."""
        uses = self.uses(rank, side)
        return tuple(chunk for chunk in self.shard(member) if chunk in uses)

    def members(self, side: str, whose: str) -> dict[int, tuple[int, ...]]:
        """Whose rows a rank is sent for a part of a side, and which; those of whom it uses nothing are left out."""
        ranks: Iterable[int] = after(self.rank, self.team(side))
        if whose != OTHERS:
            ranks = self._in_turn(self.team(side, origin_of(self.grid, self.rank, visit_number(whose))))
        found = {member: self._used_of(member, self.rank, side) for member in ranks}
        return {member: chunks for member, chunks in found.items() if chunks}

    def users(self, side: str, whose: str) -> dict[int, tuple[int, ...]]:
        """To whom a rank sends its own rows for a part of a side, and which of them: the other end of `members`."""
        ranks: Iterable[int] = after(self.rank, self.team(side))
        if whose != OTHERS:
            visit, homes = visit_number(whose), self._in_turn(self.team(side))
            ranks = (host_of(self.grid, home, origin_of(self.grid, home, visit)) for home in homes)
        found = {user: self._used_of(self.rank, user, side) for user in ranks}
        return {user: chunks for user, chunks in found.items() if chunks}

    def _in_turn(self, team: Sequence[int]) -> tuple[int, ...]:
        """A team from the rank's own place in its team on: so not everyone sends to the same one first."""
        place = self.team(self.rider).index(self.rank)
        return (*team[place:], *team[:place])

    # --- inputs ---

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the rider that are others' rows in the order of their use: the team's, then each visit's."""
        team = (OTHERS,) if len(self.team(self.rider)) > 1 else ()
        return (*team, *(at(visit) for visit in range(1, self.grid.ring)))

    def send_for_resident(self) -> None:
        """Exchange the resident's rows in its team."""
        if len(self.team(self.resident)) > 1:
            for bundle in self.bundles(self.resident):
                self._fetch(bundle, self.resident, OTHERS, self.axis(self.resident))

    def send_for(self, part: int) -> None:
        """Exchange the rows of a part of the rider: its team's first, then visit by visit."""
        for whose in self.parts[part : part + 1]:
            for bundle in self.bundles(self.rider):
                self._fetch(bundle, self.rider, whose, self._axis_of(whose))

    def _axis_of(self, whose: str) -> str:
        """Along which axis a part of the rider moves: visits are of ranks anywhere."""
        return self.axis(self.rider) if whose == OTHERS else "cp"

    def _fetch(self, bundle: str, side: str, whose: str, axis: str) -> None:
        write, coming, leaving = self.writer, self.members(side, whose), self.users(side, whose)
        if bundle == "q" and self.q_kept and self.backward:
            # The other end was told the same.
            if coming:
                rows = sorted(chunk for chunks in coming.values() for chunk in chunks)
                self.given.append(write.value(write.name(whose, bundle), TENSORS[bundle], rows))
            return
        own = self._rows(bundle, side, OWN)
        number = 0 if whose == OTHERS else visit_number(whose)
        sends = [write.message(user, own, "gather", bundle, number, chunks) for user, chunks in leaving.items()]
        receives = []
        for member, chunks in coming.items():
            name = write.value(write.name(f"{whose}from{member}", bundle), TENSORS[bundle], chunks)
            receives.append(write.message(member, name, "gather", bundle, number))
        write.start(axis, sends, receives)

    def _rows(self, bundle: str, side: str, whose: str) -> str:
        name, write = self.writer.name(whose, bundle), self.writer
        if whose == OWN or name in write.values:
            return super()._rows(bundle, side, whose)
        write.assemble(name, [write.name(f"{whose}from{member}", bundle) for member in self.members(side, whose)])
        if bundle == "q" and self.q_kept and not self.backward:
            self.keeps[name] = None
        return name

    # --- tiles and results ---

    def chunks(self, side: str, whose: str) -> tuple[int, ...]:
        if whose == OWN:
            return super().chunks(side, whose)
        return tuple(sorted(chunk for chunks in self.members(side, whose).values() for chunk in chunks))

    def meet(self, rider: str, *, resident: str) -> None:
        """The tiles of some of the resident's rows against some of the rider's, if there are any."""
        if rider != OWN and not self.members(self.rider, rider):
            return
        if resident == OTHERS and not (len(self.team(self.resident)) > 1 and self.members(self.resident, OTHERS)):
            return
        self.attend(resident, rider)
        last = self.writer.program[-1]
        assert isinstance(last, Attend)
        # Own rows against own rows make the sums that a rank of nothing but padding has, too: zeros.
        if not last.tiles and (resident, rider) != (OWN, OWN):
            self.writer.program.pop()

    def return_rider(self, whose: str) -> None:
        """Send home what was computed for others' rows of a part of the rider; receive the same for one's own."""
        if self.results(self.rider):
            self._send_back(self.rider, whose, self._axis_of(whose))

    def return_resident(self) -> None:
        """The same for the resident."""
        if self.results(self.resident) and len(self.team(self.resident)) > 1:
            self._send_back(self.resident, OTHERS, self.axis(self.resident))

    def _send_back(self, side: str, whose: str, axis: str) -> None:
        write, number = self.writer, 0 if whose == OTHERS else visit_number(whose)
        into, sends, receives = self._sum(side, OWN), [], []
        for member, chunks in self.members(side, whose).items():
            source = self._sum(side, whose)
            sends.append(write.message(member, source, "home", side, number, chunks))
        for user, chunks in self.users(side, whose).items():
            coming = write.value(write.name(f"{whose}back{user}", side), self.results(side), chunks)
            receives.append(write.message(user, coming, "home", side, number))
            self._coming.setdefault(into, []).append(coming)
        write.start(axis, sends, receives)


def write_sparse(lanes: Sequence[SparseLane]) -> None:
    """The whole program: first what is sent for, own rows meanwhile, then part after part; results leave at once."""
    for lane in lanes:
        lane.split()
        lane.send_for_resident()
        for part in range(AHEAD):
            lane.send_for(part)
    # Own rows are what nobody waits for: the first lane's while its inputs are on their way here, the others' while
    # their results are on their way home.
    lanes[0].meet(OWN, resident=OWN)
    for index, lane in enumerate(lanes):
        _visit_all(lane)
        if index:
            lanes[index - 1].finish()
            lane.meet(OWN, resident=OWN)
    lanes[-1].finish()
    for lane in lanes:
        lane.store()


def _visit_all(lane: SparseLane) -> None:
    lane.meet(OWN, resident=OTHERS)
    for part, rider in enumerate(lane.parts):
        lane.send_for(part + AHEAD)
        lane.meet(rider, resident=OTHERS)
        lane.meet(rider, resident=OWN)
        lane.return_rider(rider)
    lane.return_resident()
