"""One head group on one rank: its values, its moves and its tiles, each added to the program when asked for.

What is computed for others' rows is sent home to them. :mod:`megatron_wallfacer.schedule.schedule` decides the order.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_wallfacer.schedule import ops
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.mask import Pattern
from megatron_wallfacer.schedule.merging import merges_rows, ranks_per_call
from megatron_wallfacer.schedule.ops import Attend
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.published import entering, target
from megatron_wallfacer.schedule.ring import Link, host_of
from megatron_wallfacer.schedule.sides import ALL, OTHERS, OWN, TENSORS, Sides, at, visit_number
from megatron_wallfacer.schedule.tiles import tiles
from megatron_wallfacer.schedule.writer import Writer


class Lane(Sides):
    """The schedule of one head group, while it is being written.

    Args:
        plan: grid and choices.
        rank: index in the context-parallel group.
        writer: where it is written.
        backward: the gradient pass.
        causal: causal mask, else full attention.
        q_kept: forward keeps the gathered queries, or has kept them.
        pattern: what is live, in place of ``causal``.

    Attributes:
        merges_rows: local and gathered rows of the stationary operand are one block, their results one accumulator.
        keeps: names that are kept for backward.
        given: names that forward has kept.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        writer: Writer,
        *,
        backward: bool,
        causal: bool,
        q_kept: bool,
        pattern: Pattern | None = None,
    ) -> None:
        super().__init__(plan, rank, backward=backward)
        self.writer, self.causal, self.pattern = writer, causal, pattern
        # In that order queries that ride are not gathered in the team.
        self.q_kept = q_kept and not (plan.kv_order == "permuted" and "q" in (plan.forward, plan.backward))
        self.merges_rows = merges_rows(self, writer.groups)
        self.keeps: dict[str, None] = {}
        self.given: list[str] = []
        self._hopped: set[int] = set()
        self._coming: dict[str, list[str]] = {}

    # --- rows ---

    def split(self) -> None:
        """Name the rank's own rows; on a head axis, give every rank its heads of them."""
        for bundle in dict.fromkeys((*self.bundles("q"), *self.bundles("kv"))):
            name, write = self.writer.name(OWN, bundle), self.writer
            mine = shard_chunks(self.rank, self.grid.cp_size)
            if self.grid.head == 1:
                write.load(name, TENSORS[bundle], mine)
            elif self.backward and bundle != "dout":
                # Forward has kept what it was sent: to send it again would cost words and save no memory.
                self.given.append(write.value(name, TENSORS[bundle], self.shard(self.rank)))
            else:
                self._split(bundle, name, mine)

    def _split(self, bundle: str, name: str, mine: Sequence[int]) -> None:
        write = self.writer
        write.load(f"{name}<{self.rank}", TENSORS[bundle], mine)
        sends, receives = [], []
        for peer in after(self.rank, self._heads()):
            leaving = write.load(f"{name}>{peer}", TENSORS[bundle], mine, self._part_of(peer))
            coming = write.value(f"{name}<{peer}", TENSORS[bundle], shard_chunks(peer, self.grid.cp_size))
            sends.append(write.message(peer, leaving, "split", bundle))
            receives.append(write.message(peer, coming, "split", bundle))
        write.start("head", sends, receives)

    def rows(self, side: str, whose: str) -> tuple[str, ...]:
        """Names that have some rows of a side between them. What is missing for that is put together now."""
        return tuple(self._rows(bundle, side, whose) for bundle in self.bundles(side))

    def _rows(self, bundle: str, side: str, whose: str) -> str:
        name, write = self.writer.name(whose, bundle), self.writer
        if name in write.values:
            return name
        if whose == OWN:
            write.assemble(name, [f"{name}<{peer}" for peer in self._heads()])
            if not self.backward:
                self.keeps[name] = None
        if whose == OTHERS:
            write.assemble(name, [write.name(f"from{peer}", bundle) for peer in after(self.rank, self.team(side))])
            if bundle == "q" and self.q_kept and not self.backward:
                self.keeps[name] = None
        if whose == ALL:
            write.assemble(name, [self._rows(bundle, side, OWN), *self._gathered(bundle, side)])
        return name

    def _gathered(self, bundle: str, side: str) -> list[str]:
        """Names of the gathered rows: as they arrive, or the one under which they are kept for backward."""
        if bundle == "q" and self.q_kept:
            return [self._rows(bundle, side, OTHERS)]
        return [self.writer.name(f"from{peer}", bundle) for peer in after(self.rank, self.team(side))]

    def start_near(self) -> None:
        """Send the rider around the inner ring of home."""
        if len(self.home_turn) > 1:
            self.start_hops(0, "ring_inner")

    def start_far(self) -> None:
        """Send for others' rows, the resident's first, and send the rider on its way."""
        for bundle in self.bundles(self.resident):
            self._gather(bundle, self.resident)
        for bundle in self.bundles(self.rider):
            if self.published:
                self._enter(bundle)
            else:
                self._gather(bundle, self.rider)
        if self.home_parts == (OWN,):
            self.start_hops(0, *(("ring_outer",) if len(self.home_turn) > 1 else ()))

    def _gather(self, bundle: str, side: str) -> None:
        """Every rank of a side's team sends its rows to every other."""
        ranks, write = self.team(side), self.writer
        if len(ranks) > 1 and bundle == "q" and self.backward and self.q_kept:
            rows = self.block(rank for rank in ranks if rank != self.rank)
            self.given.append(write.value(write.name(OTHERS, "q"), ops.Q, rows))
            return
        own = self._rows(bundle, side, OWN)
        self._exchange("gather", bundle, self.axis(side), ranks, own, {peer: self.shard(peer) for peer in ranks})

    def _exchange(
        self, kind: str, bundle: str, axis: str, ranks: Sequence[int], own: str, rows: dict[int, tuple[int, ...]]
    ) -> None:
        """Send a value to each of some ranks; receive each one's, of those rows."""
        write, others = self.writer, after(self.rank, ranks)
        for peer in others:
            write.value(write.name(f"from{peer}", bundle), TENSORS[bundle], rows[peer])
        sends = [write.message(peer, own, kind, bundle) for peer in others]
        receives = [write.message(peer, write.name(f"from{peer}", bundle), kind, bundle) for peer in others]
        write.start(axis, sends, receives)

    # --- the turn of the ring ---

    def arrive(self, whose: str) -> None:
        """The rider's rows are about to be used for the first time: send a block on that has just become whole."""
        if whose == OTHERS:
            self.start_hops(0)
        elif whose != OWN:
            self.start_hops(visit_number(whose))

    def start_hops(self, visit: int, *axes: str) -> None:
        """Send the block of a visit on, and receive what comes here for the visit that this makes elsewhere.

        Waits for the block, if it is still on its way. Along these axes; along all that are left unless given.
        """
        write = self.writer
        for link in self.visits[visit].forwards:
            if link.visit in self._hopped or (axes and link.axis not in axes):
                continue
            self._hopped.add(link.visit)
            for bundle in self.bundles(self.rider):
                block = self._first_block(bundle) if visit == 0 else write.name(at(visit), bundle)
                coming, source = self.visits[link.visit], write.name(at(link.visit), bundle)
                write.value(source, TENSORS[bundle], self.block_of(coming.origin))
                send = write.message(link.peer, block, "block", bundle, link.visit)
                receive = write.message(coming.arrives.peer, source, "block", bundle, link.visit)
                write.start(link.axis, [send], [receive])

    def _first_block(self, bundle: str) -> str:
        """The rider's first block as one value, to be sent."""
        if self.home_parts != (OWN, OTHERS):
            return self._rows(bundle, self.rider, self.home_parts[0])
        parts = [self._rows(bundle, self.rider, whose) for whose in self.home_parts]
        return self.writer.assemble(self.writer.name("first", bundle), parts)

    def attend(self, resident: str, rider: str, *, only: Sequence[int] | None = None) -> None:
        """The tiles of some of the resident's rows against some of the rider's; ``only`` these query chunks."""
        whose = {self.resident: resident, self.rider: rider}
        names = {side: self.rows(side, whose[side]) for side in ("q", "kv")}
        chunks = {side: self.writer.values[names[side][0]].chunks for side in names}
        found = tiles(chunks["q"], chunks["kv"], causal=self.causal, only=only, pattern=self.pattern)
        sums = {side: self._sum(side, whose[side]) for side in names if self.results(side)}
        self.writer.program.append(Attend(names["q"], names["kv"], sums["q"], sums.get("kv"), found))

    # --- results on their way home ---

    def sum_name(self, side: str, whose: str) -> str:
        """Name of the accumulator that has some rows of a side."""
        return self.writer.name(f"{self._accumulated_as(side, whose)}.sum", side)

    def _accumulated_as(self, side: str, whose: str) -> str:
        return ALL if side == self.resident and whose in (OWN, OTHERS) and self.merges_rows else whose

    def _sum(self, side: str, whose: str) -> str:
        name = self.sum_name(side, whose)
        if name not in self.writer.values:
            self.writer.value(name, self.results(side), self.chunks(side, self._accumulated_as(side, whose)))
        return name

    def take_in(self, side: str, whose: str) -> None:
        """Add to an accumulator what has been sent towards it. Waits for it."""
        for source in self._coming.pop(self.sum_name(side, whose), ()):
            self.writer.fold(source, self._sum(side, whose))

    def send_travelled(self, visit: int) -> None:
        """Send the rider's results of a visit towards home: gradients along their path, a partial output at once."""
        if not self.results(self.rider):
            return
        if self.backward:
            self.take_in(self.rider, at(visit))
            self._send_sum(visit, self.visits[visit].returns)
        else:
            self._send_partial(visit)

    def _send_sum(self, visit: int, link: Link) -> None:
        kind = "close" if link.closes else "sum"
        of = self.visits[link.visit]
        peer = next(one.peer for one in of.sums if (one.axis, one.closes) == (link.axis, link.closes))
        self._swap(kind, link.axis, visit, link.peer, link.visit, self.block_of(of.origin), peer)

    def _send_partial(self, visit: int) -> None:
        home = self.visits[visit].origin
        for whose in self.home_parts:
            self.take_in(self.rider, whose)
        host = host_of(self.grid, self.rank, home)
        self._swap("home", "cp", visit, home, 0, self.block_of(self.rank), host, number=visit)

    def _swap(
        self,
        kind: str,
        axis: str,
        visit: int,
        to: int,
        for_visit: int,
        rows: Sequence[int],
        peer: int,
        number: int | None = None,
    ) -> None:
        """Send the sum of a visit; receive one for the visit ``for_visit``."""
        write, side, number = self.writer, self.rider, for_visit if number is None else number
        coming = write.value(write.name(f"{kind}{number}.{axis}", side), self.results(side), rows)
        send = write.message(to, self.sum_name(side, at(visit)), kind, side, number)
        write.start(axis, [send], [write.message(peer, coming, kind, side, number)])
        for whose in self.home_parts if for_visit == 0 else (at(for_visit),):
            self._coming.setdefault(self.sum_name(side, whose), []).append(coming)

    def attend_resident(self, rider: str, *, own: bool) -> None:
        """Add the tiles of gathered rows of the stationary operand and, if ``own``, of the local rows."""
        if own and self.merges_rows:
            self.attend(ALL, rider)
            return
        # Where results travel, local rows need not wait for a gather; where they rest, gathered rows go home sooner.
        for whose in self.resident_parts if self.results(self.rider) else reversed(self.resident_parts):
            if whose == OTHERS:
                self.attend_others(rider)
            elif own:
                self.attend(OWN, rider)

    def attend_others(self, rider: str, ranks: Sequence[int] = ()) -> None:
        """Add the tiles of gathered rows of the stationary operand: of these ranks, or of all its team."""
        rows = self.block(ranks or after(self.rank, self.team(self.resident)))
        if self.merges_rows:
            self.attend(ALL, rider, only=rows)
        else:
            self.attend(OTHERS, rider, only=rows if ranks else None)

    def attend_last(self, rider: str) -> None:
        """Add the last tiles of gathered rows, some ranks' after others', and send the results of each home at once."""
        if self.resident != "q":
            self.attend_others(rider)
        for ranks in self._returns() if self.results(self.resident) else ():
            if self.resident == "q":
                self.attend_others(rider, ranks)
            self.send_home_to(self.resident, ranks)

    def _returns(self) -> list[tuple[int, ...]]:
        """The ranks of the team in the order in which results are sent home; those of one call together."""
        others = after(self.rank, self.team(self.resident))
        each = ranks_per_call(self.plan, self.writer.groups) if self.merges_rows else 1
        return [others[first : first + each] for first in range(0, len(others), each)]

    def send_home(self, side: str) -> None:
        """Send what was computed for others' rows of a side home; receive what they computed for one's own."""
        if not self.results(side):
            return
        if self.published and side == self.rider:
            self._leave()
        else:
            for peer in after(self.rank, self.team(side)):
                self.send_home_to(side, [peer])

    def send_home_to(self, side: str, peers: Sequence[int], source: str | None = None) -> None:
        """As :meth:`send_home`, to some ranks; receive from those that are as far before as these are after."""
        opposite = dict(pairs(self.rank, self.team(side)))
        source, own = source or self.sum_name(side, OTHERS), self._sum(side, OWN)
        ends = [(peer, opposite[peer], self.shard(peer)) for peer in peers]
        self._return("scatter", side, self.axis(side), source, own, ends, self.shard(self.rank))

    def _return(
        self,
        kind: str,
        side: str,
        axis: str,
        source: str,
        into: str,
        ends: Sequence[tuple[int, int, Sequence[int]]],
        mine: Sequence[int],
    ) -> None:
        """Send ranks their rows of a sum, and receive one's own rows of ``into`` from as many.

        Args:
            kind, side, axis: of the messages.
            source: the sum that is sent.
            into: the sum to which what arrives is added.
            ends: of each message to a rank and from another, the two ranks and the rows that are sent.
            mine: the rows that each rank sends here.
        """
        write, sends, receives = self.writer, [], []
        for to, came_from, rows in ends:
            coming = write.value(write.name(f"{kind}{came_from}", side), self.results(side), mine)
            sends.append(write.message(to, source, kind, side, chunks=rows))
            receives.append(write.message(came_from, coming, kind, side))
            self._coming.setdefault(into, []).append(coming)
        write.start(axis, sends, receives)

    def finish(self) -> None:
        """Complete the rank's own results, and start their way back along the head axis."""
        for side in ("q", "kv"):
            if not self.results(side):
                continue
            self.take_in(side, OWN)
            self._join(side)

    def _join(self, side: str) -> None:
        write, own, mine = self.writer, self.sum_name(side, OWN), shard_chunks(self.rank, self.grid.cp_size)
        sends, receives = [], []
        for peer in after(self.rank, self._heads()):
            coming = write.value(write.name(f"joined{peer}", side), self.results(side), mine, self._part_of(peer))
            rows = shard_chunks(peer, self.grid.cp_size)
            sends.append(write.message(peer, own, "join", side, chunks=rows))
            receives.append(write.message(peer, coming, "join", side))
        write.start("head", sends, receives)

    def store(self) -> None:
        """Put the rank's own results of both sides where they belong."""
        heads = after(self.rank, self._heads())
        sides = [side for side in ("q", "kv") if self.results(side)]
        joined = [self.writer.name(f"joined{peer}", side) for side in sides for peer in heads]
        self.writer.store(*(self.sum_name(side, OWN) for side in sides), *joined)

    # --- into the published order and out of it ---

    def _enter(self, bundle: str) -> None:
        write, own = self.writer, self._rows(bundle, self.rider, OWN)
        block, (came_from, team) = write.name(at(0), bundle), entering(self.grid, self.rank)
        if self.plan.kv_order == "paper":
            self._gather(bundle, self.rider)
            others = () if len(team) == 1 else (self._rows(bundle, self.rider, OTHERS),)
            whole = write.assemble(write.name("first", bundle), [own, *others])
            self._jump("entry", bundle, whole, block, TENSORS[bundle], self.block(team), came_from)
            return
        single = write.name("entered", bundle)
        self._jump("entry", bundle, own, single, TENSORS[bundle], self.shard(came_from), came_from)
        group = self.grid.neighbours(self.rank, "kv_team")
        rows = {peer: self.shard(entering(self.grid, peer)[0]) for peer in group}
        self._exchange("regather", bundle, "kv_team", group, single, rows)
        write.assemble(block, [single, *(write.name(f"from{peer}", bundle) for peer in after(self.rank, group))])

    def _jump(
        self, kind: str, bundle: str, source: str, into: str, payload: tuple[str, ...], rows: Sequence[int], peer: int
    ) -> None:
        """A value into the published order (from ``peer``) or out of it (to ``peer``), across the whole group."""
        write, there = self.writer, target(self.grid, self.rank)
        if there == self.rank:
            write.assemble(into, [source])
            return
        to, came_from = (there, peer) if kind == "entry" else (peer, there)
        write.value(into, payload, rows)
        write.start("cp", [write.message(to, source, kind, bundle)], [write.message(came_from, into, kind, bundle)])

    def _leave(self) -> None:
        """The rider's results of the first visit back to the ranks that they belong to."""
        side, write = self.rider, self.writer
        self.take_in(side, at(0))
        first, came_from = self.sum_name(side, at(0)), entering(self.grid, self.rank)[0]
        payload, mine = self.results(side), self.shard(self.rank)
        if self.plan.kv_order == "paper":
            whole = write.name("exited", side)
            self._jump("exit", side, first, whole, payload, self.block(self.team(side)), came_from)
            self._coming.setdefault(self._sum(side, OWN), []).append(whole)
            for peer in after(self.rank, self.team(side)):
                self.send_home_to(side, [peer], whole)
            return
        group = self.grid.neighbours(self.rank, "kv_team")
        single = write.name("leaving.sum", side)
        write.fold(first, write.value(single, payload, self.shard(came_from)))
        for to, opposite in pairs(self.rank, group):
            ends = [(to, opposite, self.shard(entering(self.grid, to)[0]))]
            self._return("unenter", side, "kv_team", first, single, ends, self.shard(came_from))
        for source in self._coming.pop(single, ()):
            write.fold(source, single)
        whole = write.name("exited", side)
        self._jump("exit", side, single, whole, payload, mine, came_from)
        self._coming.setdefault(self._sum(side, OWN), []).append(whole)

    # --- peers ---

    def _heads(self) -> tuple[int, ...]:
        return self.grid.neighbours(self.rank, "head")

    def _part_of(self, rank: int) -> int:
        """The part of the heads that a rank has in this group."""
        return self.grid.coordinates(rank)["head"] * self.writer.groups + self.writer.group


def after(rank: int, ranks: Sequence[int]) -> tuple[int, ...]:
    """The other ranks, those after this one first: so not everyone sends to the same one first."""
    position = ranks.index(rank)
    return (*ranks[position + 1 :], *ranks[:position])


def pairs(rank: int, ranks: Sequence[int]) -> list[tuple[int, int]]:
    """The other ranks, each with the one that is as far before this one as it is after."""
    others = after(rank, ranks)
    return list(zip(others, reversed(others), strict=True))
