"""Checks that prove schedules right by looking at them. Each raises :class:`Broken` with what it found.

Nothing here calls the code under test, except to build the schedules: chunks, masks, what an operation reads and
how messages match are written again from their definitions. :mod:`tests.schedule.machine` proves the rest by running
the programs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate
from operator import or_

from megatron_wallfacer.schedule.mask import ChunkMask
from megatron_wallfacer.schedule.ops import (
    Accumulate,
    Attend,
    Concat,
    Message,
    Op,
    PostRecv,
    Schedule,
    SendRecv,
    Transfer,
    View,
    WriteResult,
)
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.tiles import Tile

LARGEST = 4096

Masks = dict[int, int]
"""Chunks of one side as bits, by chunk of the other."""
Names = tuple[str, ...]
Channel = tuple[str, str]
Ends = dict[tuple[int, str, Channel], list[tuple]]
"""Messages in order, by (peer, "sends" or "receives", channel)."""

KV = ("k", "v")
#: What tiles read of the query side, by pass.
Q_SIDE = {False: ("q",), True: ("q", "dout", "lse", "delta")}
#: What a rank can name as its own, by pass.
LOADED = {False: {"q", "k", "v"}, True: {"q", "k", "v", "dout", "lse", "delta"}}
#: What a pass must end with, for each head slice.
ENDS = {False: (("out", "lse"),), True: (("dq",), ("dk", "dv"))}


class Broken(AssertionError):
    """A schedule does not do what it must."""


class Programs(dict[int, Schedule]):
    """The schedules of all ranks for one pass, each built when asked for; a test may put another in its place."""

    def __init__(
        self,
        plan: Plan,
        *,
        backward: bool = False,
        causal: bool | ChunkMask = True,
        groups: int = 1,
        keep_gathered_q: bool = False,
    ) -> None:
        super().__init__()
        self.plan, self.backward, self.causal, self.groups = plan, backward, causal, groups
        self.keep_gathered_q = keep_gathered_q
        self.cp_size, self.head_slices = plan.grid.cp_size, plan.grid.head * groups
        self._ends: dict[int, tuple[Schedule, Ends]] = {}

    def __missing__(self, rank: int) -> Schedule:
        build = backward_schedule if self.backward else forward_schedule
        mask = {"chunk_mask": self.causal} if isinstance(self.causal, ChunkMask) else {"causal": self.causal}
        self[rank] = build(self.plan, rank, groups=self.groups, keep_gathered_q=self.keep_gathered_q, **mask)
        return self[rank]

    def __repr__(self) -> str:
        passing = "backward" if self.backward else "forward"
        kept = f"keep_gathered_q={self.keep_gathered_q}"
        return f"{passing} of {self.plan}, causal={self.causal}, groups={self.groups}, {kept}"

    def messages(self, rank: int, peer: int, end: str, channel: Channel) -> list[tuple]:
        """What a rank sends to (``end`` is "sends") or receives from a peer over a channel, in order."""
        schedule = self[rank]
        if rank not in self._ends or self._ends[rank][0] is not schedule:
            self._ends[rank] = schedule, _by_route(schedule)
        return self._ends[rank][1].get((peer, end, channel), [])

    @property
    def ranks(self) -> range:
        return range(self.cp_size)

    def by_rank(self) -> Iterator[Schedule]:
        """Every rank's."""
        return (self[rank] for rank in self.ranks)


def _by_route(schedule: Schedule) -> Ends:
    found: Ends = {}
    for transfer in schedule.transfers:
        for end in ("sends", "receives"):
            # Within a transfer nothing comes first.
            for message in sorted(getattr(transfer, end), key=lambda message: message.tag):
                head_slice = schedule.values[message.value].head_slice
                described = (message.tag, transfer.payload, message.chunks, head_slice)
                found.setdefault((message.peer, end, transfer.channel), []).append(described)
    return found


# --- definitions, written again ---


def chunks_of(ranks: Iterable[int], cp_size: int) -> list[int]:
    """Chunks of a block, by position: rank r holds r and 2P-1-r."""
    return sorted([*ranks, *(2 * cp_size - 1 - rank for rank in ranks)])


def holders(chunks: Iterable[int], cp_size: int) -> set[int]:
    """The ranks whose own these chunks are."""
    return {min(chunk, 2 * cp_size - 1 - chunk) for chunk in chunks}


def live(q_chunk: int, k_chunks: int, causal: bool | ChunkMask) -> tuple[int, int]:
    """Of these key chunks, those that a query chunk sees in full, and those of which it sees the lower triangle.

    With a pattern in place of ``causal``, the part is for its mask to say.
    """
    if isinstance(causal, ChunkMask):
        some, every = (sum(1 << chunk for chunk in range(*ends[q_chunk])) for ends in (causal.nonempty, causal.full))
        return k_chunks & every, k_chunks & some & ~every
    if not causal:
        return k_chunks, 0
    return k_chunks & ((1 << q_chunk) - 1), k_chunks & (1 << q_chunk)


def is_result(payload: Iterable[str]) -> bool:
    """Whether these tensors are summed or merged on their way; inputs are only passed on."""
    return not {"out", "dq", "dk", "dv"}.isdisjoint(payload)


def needs(op: Op) -> Names:
    """Names that an operation reads."""
    match op:
        case Concat() | WriteResult():
            return op.sources
        case SendRecv():
            return tuple(message.value for message in op.transfer.sends)
        case Attend():
            return (*op.q, *op.kv)
        case Accumulate():
            return (op.source,)
    return ()


def makes(op: Op) -> Names:
    """Names to which an operation gives their whole value."""
    match op:
        case View() | Concat():
            return (op.into,)
        case SendRecv():
            return tuple(message.value for message in op.transfer.receives)
    return ()


def accumulators(op: Op) -> Names:
    """Names to which an operation adds."""
    match op:
        case Accumulate():
            return (op.into,)
        case Attend():
            return (op.q_into,) if op.kv_into is None else (op.q_into, op.kv_into)
    return ()


def changes(op: Op, schedule: Schedule) -> dict[str, set[int]]:
    """Rows of accumulators to which an operation adds."""
    match op:
        case Accumulate():
            source, into = schedule.values[op.source], schedule.values[op.into]
            return {op.into: set(source.chunks) & set(into.chunks)}
        case Attend():
            q_chunks, k_chunks = (schedule.values[names[0]].chunks for names in (op.q, op.kv))
            found = {op.q_into: {chunk for tile in op.tiles for chunk in q_chunks[slice(*tile.rows)]}}
            if op.kv_into is not None:
                found[op.kv_into] = {chunk for tile in op.tiles for chunk in k_chunks[slice(*tile.cols)]}
            return found
    return {}


# --- one rank's program ---


def check_program(schedule: Schedule, *, causal: bool | ChunkMask) -> None:
    """All that can be seen in the program of one rank alone."""
    check_values(schedule)
    check_order(schedule)
    check_own(schedule)
    check_posted_receives(schedule)
    for op in schedule.ops:
        match op:
            case Attend():
                check_attend(schedule, op, causal)
            case Concat():
                check_concat(schedule, op)
            case Accumulate():
                check_accumulate(schedule, op)


def check_values(schedule: Schedule) -> None:
    """Each name stands for some tensors, some chunks by position, of one head slice."""
    used = {name for op in schedule.ops for name in (*needs(op), *makes(op), *accumulators(op))}
    if unknown := {*used, *schedule.given, *schedule.keeps} - schedule.values.keys():
        raise Broken(f"rank {schedule.rank}: nothing says what {sorted(unknown)} stand for")
    for name, value in schedule.values.items():
        ascending = list(value.chunks) == sorted(set(value.chunks))
        if not ascending or not value.chunks or not 0 <= value.chunks[0] <= value.chunks[-1] < 2 * schedule.cp_size:
            raise Broken(f"rank {schedule.rank}: {name} has rows {value.chunks}")
        if value.head_slice not in range(schedule.head_slices) or not value.payload:
            raise Broken(f"rank {schedule.rank}: {name} has tensors {value.payload} of head slice {value.head_slice}")


def check_order(schedule: Schedule) -> None:
    """What is read has a value, is made once, and does not change once it was sent or stored; nothing is made in vain.

    Nothing is added to a value that a transfer brings before that transfer was waited for.
    """
    written, read = set(schedule.given), set(schedule.keeps)
    arriving: dict[str, Transfer] = {}
    fixed: dict[str, set[int]] = {}
    for op in schedule.ops:
        for name in needs(op):
            if name not in written:
                raise Broken(f"rank {schedule.rank}: {op} reads {name}, which has no value yet")
            read.add(name)
            for message in arriving[name].receives if name in arriving else ():
                del arriving[message.value]
        for name in makes(op):
            if name in written:
                raise Broken(f"rank {schedule.rank}: {op} makes {name}, which has a value")
            written.add(name)
        for name, rows in changes(op, schedule).items():
            if name in arriving:
                raise Broken(f"rank {schedule.rank}: {op} changes {name}, which is still on its way here")
            if late := rows & fixed.get(name, set()):
                raise Broken(f"rank {schedule.rank}: {op} changes chunks {late} of {name}, which were sent or stored")
            written.add(name)
        for name, rows in _fixes(op, schedule):
            fixed.setdefault(name, set()).update(rows)
        if isinstance(op, SendRecv):
            arriving |= {message.value: op.transfer for message in op.transfer.receives}
    if written - read:
        raise Broken(f"rank {schedule.rank}: nobody reads {sorted(written - read)}")
    if missing := set(schedule.keeps) - written:
        raise Broken(f"rank {schedule.rank} keeps {sorted(missing)}, which never have a value")


def _fixes(op: Op, schedule: Schedule) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Rows that may not change after an operation."""
    if isinstance(op, SendRecv):
        yield from ((message.value, message.chunks) for message in op.transfer.sends)
    if isinstance(op, WriteResult):
        yield from ((source, tuple(chunks_of([schedule.rank], schedule.cp_size))) for source in op.sources)


def check_own(schedule: Schedule) -> None:
    """Only the rank's own chunks are loaded and stored, and results of every head slice are stored once."""
    own = tuple(chunks_of([schedule.rank], schedule.cp_size))
    stored: Counter[tuple[Names, int]] = Counter()
    for op in schedule.ops:
        names = (op.into,) if isinstance(op, View) else op.sources if isinstance(op, WriteResult) else ()
        for value in (schedule.values[name] for name in names):
            # With a head axis a sum has the rows of all who share the tokens; only the rank's own are stored.
            if value.chunks != own and not (isinstance(op, WriteResult) and set(own) <= set(value.chunks)):
                raise Broken(f"rank {schedule.rank}: {op} of chunks {value.chunks}, which are not its own")
            if isinstance(op, View) and not set(value.payload) <= LOADED[schedule.backward]:
                raise Broken(f"rank {schedule.rank} loads {value.payload}, which no rank has yet")
            if isinstance(op, WriteResult):
                stored[value.payload, value.head_slice] += 1
    wanted = Counter(
        (payload, head_slice) for payload in ENDS[schedule.backward] for head_slice in range(schedule.head_slices)
    )
    if stored != wanted:
        raise Broken(f"rank {schedule.rank} does not store every result once: {dict(stored)}")


def check_posted_receives(schedule: Schedule) -> None:
    """A transfer is expected at most once, and starts, as it was expected, later."""
    expected: list[Transfer] = []
    for op in schedule.ops:
        if isinstance(op, PostRecv):
            if op.transfer in expected:
                raise Broken(f"rank {schedule.rank} expects twice {op.transfer}")
            expected.append(op.transfer)
        if isinstance(op, SendRecv) and op.transfer in expected:
            expected.remove(op.transfer)
    if expected:
        raise Broken(f"rank {schedule.rank} expects and does not start later {expected}")


def check_concat(schedule: Schedule, op: Concat) -> None:
    """The rows of the sources, which do not overlap and are of the same tensors and heads."""
    into, sources = schedule.values[op.into], [schedule.values[name] for name in op.sources]
    rows = sorted(chunk for source in sources for chunk in source.chunks)
    kinds = {(source.payload, source.head_slice) for source in sources}
    if tuple(rows) != into.chunks or kinds != {(into.payload, into.head_slice)}:
        raise Broken(f"rank {schedule.rank}: {op} is of {sources} into {into}")


def check_accumulate(schedule: Schedule, op: Accumulate) -> None:
    """Two different accumulators of the same tensors and heads that have some rows in common."""
    source, into = schedule.values[op.source], schedule.values[op.into]
    same = (source.payload, source.head_slice) == (into.payload, into.head_slice) and is_result(into.payload)
    if not same or op.source == op.into or set(source.chunks).isdisjoint(into.chunks):
        raise Broken(f"rank {schedule.rank}: {op} is of {source} into {into}")


# --- tiles ---


def check_attend(schedule: Schedule, attend: Attend, causal: bool | ChunkMask) -> None:
    """Both sides have what tiles read, of the same heads; so have the accumulators; only live pairs are computed."""
    _check_side(schedule, attend, attend.q, Q_SIDE[schedule.backward], attend.q_into, ENDS[schedule.backward][0])
    if (attend.kv_into is not None) != schedule.backward:
        raise Broken(f"rank {schedule.rank}: {attend} has a wrong set of results")
    _check_side(schedule, attend, attend.kv, KV, attend.kv_into, ("dk", "dv"))
    head_slices = {schedule.values[name].head_slice for name in (*needs(attend), *accumulators(attend))}
    if len(head_slices) != 1:
        raise Broken(f"rank {schedule.rank}: {attend} is of different head slices {head_slices}")
    full, triangles = computed(schedule, attend)
    keys = sum(1 << chunk for chunk in schedule.values[attend.kv[0]].chunks)
    for q_chunk in full:
        allowed, diagonal = live(q_chunk, keys, causal)
        if full[q_chunk] & ~allowed or triangles[q_chunk] & ~diagonal:
            raise Broken(f"rank {schedule.rank}: query chunk {q_chunk} sees keys that it must not: {attend}")


def _check_side(
    schedule: Schedule, attend: Attend, names: Names, wanted: Names, into: str | None, results: Names
) -> None:
    values = [schedule.values[name] for name in names]
    rows = {value.chunks for value in values}
    if len(rows) != 1:
        raise Broken(f"rank {schedule.rank}: {attend} has different rows of one side: {rows}")
    if missing := set(wanted).difference(*(value.payload for value in values)):
        raise Broken(f"rank {schedule.rank}: {attend} does not have {sorted(missing)}")
    total = None if into is None else schedule.values[into]
    if total is not None and (total.payload != results or not set(values[0].chunks) <= set(total.chunks)):
        raise Broken(f"rank {schedule.rank}: {attend} of {rows} adds to {total}")


def computed(schedule: Schedule, attend: Attend) -> tuple[Masks, Masks]:
    """What tiles compute, by query chunk: (full squares, lower triangles and what else is a part)."""
    q_chunks, k_chunks = (schedule.values[names[0]].chunks for names in (attend.q, attend.kv))
    before = list(accumulate((1 << chunk for chunk in k_chunks), or_, initial=0))
    full, triangles = dict.fromkeys(q_chunks, 0), dict.fromkeys(q_chunks, 0)
    for tile in attend.tiles:
        _check_inside(tile, len(q_chunks), len(k_chunks))
        first, end = tile.cols
        for row in range(*tile.rows):
            q_chunk = q_chunks[row]
            on = first + row - tile.rows[0]
            seen = before[on if tile.causal else first if tile.partial else end] ^ before[first]
            triangle = (
                before[on + 1] ^ before[on] if tile.causal else before[end] ^ before[first] if tile.partial else 0
            )
            if (full[q_chunk] | triangles[q_chunk]) & (seen | triangle):
                raise Broken(f"query chunk {q_chunk} meets a key chunk twice in one go: {attend.tiles}")
            full[q_chunk] |= seen
            triangles[q_chunk] |= triangle
    return full, triangles


def _check_inside(tile: Tile, rows: int, cols: int) -> None:
    height, width = tile.rows[1] - tile.rows[0], tile.cols[1] - tile.cols[0]
    if tile.causal and height != width:
        raise Broken(f"a causal tile is not square: {tile}")
    if not (0 <= tile.rows[0] < tile.rows[1] <= rows and 0 <= tile.cols[0] < tile.cols[1] <= cols):
        raise Broken(f"a tile is empty or outside its block of {rows} x {cols} chunks: {tile}")


class Seen:
    """What has been computed so far: key chunks as bits, by (head slice, query chunk)."""

    def __init__(self) -> None:
        self.full: dict[tuple[int, int], int] = {}
        self.triangles: dict[tuple[int, int], int] = {}

    def add(self, schedule: Schedule, only: range | set[int] | None = None) -> None:
        """All that a rank computes, for head slices that matter."""
        for attend in schedule.attends:
            head_slice = schedule.values[attend.q[0]].head_slice
            if only is None or head_slice in only:
                self._add(schedule, attend, head_slice)

    def _add(self, schedule: Schedule, attend: Attend, head_slice: int) -> None:
        for seen, masks in zip((self.full, self.triangles), computed(schedule, attend), strict=True):
            for q_chunk, mask in masks.items():
                if seen.get((head_slice, q_chunk), 0) & mask:
                    raise Broken(f"query chunk {q_chunk}: rank {schedule.rank} computes again what was computed before")
                seen[head_slice, q_chunk] = seen.get((head_slice, q_chunk), 0) | mask

    def check(self, q_chunks: Iterable[int], head_slices: Iterable[int], keys: int, causal: bool | ChunkMask) -> None:
        """Of these keys, these queries have seen exactly those that they must."""
        for head_slice in head_slices:
            for q_chunk in q_chunks:
                found = tuple(seen.get((head_slice, q_chunk), 0) & keys for seen in (self.full, self.triangles))
                if found != live(q_chunk, keys, causal):
                    raise Broken(
                        f"query chunk {q_chunk} has not seen exactly the keys that it must, head slice {head_slice}"
                    )


def check_coverage(programs: Programs) -> None:
    """Over all ranks, each live (query chunk, key chunk) pair is computed exactly once for every head slice."""
    seen = Seen()
    for rank in programs.ranks:
        seen.add(programs[rank])
    chunks = 2 * programs.cp_size
    seen.check(range(chunks), range(programs.head_slices), (1 << chunks) - 1, programs.causal)


def check_turn(programs: Programs, rank: int) -> None:
    """The ranks that share this rank's resident rows meet the whole other side with them, once between them.

    With this for every rank, coverage follows.
    """
    plan, grid = programs.plan, programs.plan.grid
    ring_operand = plan.ring_operand(backward=programs.backward)
    # Published blocks are those of the team on both sides.
    axis = "team" if ring_operand == "kv" or plan.kv_order != "native" else "kv_team"
    first = grid.coordinates(rank)["head"] * programs.groups
    head_slices, chunks = range(first, first + programs.groups), 2 * programs.cp_size
    seen, own = Seen(), chunks_of([rank], programs.cp_size)
    for member in grid.neighbours(rank, axis):
        seen.add(programs[member], head_slices)
    if ring_operand == "kv":
        seen.check(own, head_slices, (1 << chunks) - 1, programs.causal)
    else:
        seen.check(range(chunks), head_slices, sum(1 << chunk for chunk in own), programs.causal)


def check_balance(programs: Programs, ranks: Iterable[int]) -> None:
    """These ranks do their share of the work: a P-th of the live pairs of every head slice."""
    share = programs.head_slices * 4 * programs.cp_size / (2 if programs.causal else 1)
    for rank in ranks:
        area = sum(tile.area for attend in programs[rank].attends for tile in attend.tiles)
        if area != share:
            raise Broken(f"rank {rank} does work {area}, its share is {share}")


# --- transfers ---


def check_transfers(programs: Programs, rank: int) -> None:
    """Each transfer stays on its axis, sends rows that exist, and receives whole values; its messages differ."""
    schedule, grid, looks = programs[rank], programs.plan.grid, set()
    for transfer in schedule.transfers:
        if not (transfer.sends or transfer.receives):
            raise Broken(f"rank {rank} starts a transfer of nothing: {transfer}")
        along = set(programs.ranks if transfer.axis == "cp" else grid.neighbours(rank, transfer.axis)) - {rank}
        if outside := {message.peer for message in (*transfer.sends, *transfer.receives)} - along:
            raise Broken(f"rank {rank}: a transfer reaches {outside}, outside its axis: {transfer}")
        for message in transfer.sends:
            _check_sent(schedule, transfer, message)
        for message in transfer.receives:
            value = schedule.values[message.value]
            if (value.payload, value.chunks) != (transfer.payload, message.chunks):
                raise Broken(f"rank {rank}: {message} of {transfer.payload} makes {value}")
        for end in ("sends", "receives"):
            for message in getattr(transfer, end):
                look = (end, message.peer, transfer.channel, message.tag)
                if look in looks:
                    raise Broken(f"rank {rank}: {message} has a tag that was used before")
                looks.add(look)


def _check_sent(schedule: Schedule, transfer: Transfer, message: Message) -> None:
    value = schedule.values[message.value]
    inside = transfer.payload == value.payload and set(message.chunks) <= set(value.chunks)
    if not inside or not message.chunks or list(message.chunks) != sorted(set(message.chunks)):
        raise Broken(f"rank {schedule.rank}: {message} of {transfer.payload} is not in {value}")


def check_messages(programs: Programs, rank: int, most_peers: int = LARGEST) -> None:
    """What a rank sends is what its peers receive from it, in the same order, and the other way round.

    Only the first ``most_peers`` peers of each channel are asked.
    """
    peers: dict[Channel, dict[int, None]] = {}
    for transfer in programs[rank].transfers:
        here = peers.setdefault(transfer.channel, {})
        here.update(dict.fromkeys(message.peer for message in (*transfer.sends, *transfer.receives)))
    for channel, asked in peers.items():
        for peer in list(asked)[:most_peers]:
            for sender, receiver in ((rank, peer), (peer, rank)):
                sent = programs.messages(sender, receiver, "sends", channel)
                expected = programs.messages(receiver, sender, "receives", channel)
                if sent != expected:
                    raise Broken(f"rank {sender} sends {sent} over {channel} to rank {receiver}, expected: {expected}")


def check_kept(forward: Programs, backward: Programs, rank: int) -> None:
    """What backward finds at hand is what forward has kept, under the same name; only inputs are kept, for backward."""
    kept, given = forward[rank], backward[rank]
    if kept.given or given.keeps or kept.keeps != given.given:
        raise Broken(f"rank {rank}: forward keeps {kept.keeps}, backward is given {given.given}")
    for name in given.given:
        if kept.values[name] != given.values[name] or is_result(given.values[name].payload):
            raise Broken(f"rank {rank}: {name} is {kept.values[name]} in forward, {given.values[name]} in backward")
