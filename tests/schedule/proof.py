"""Checks that prove schedules right by looking at them. Each raises :class:`Broken` with what it found.

Nothing here calls the code under test, except to build the schedules: chunks, masks and matching are written
again from their definitions. :mod:`tests.schedule.machine` proves the rest by running the programs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from operator import or_

from megatron_wallfacer.schedule.moves import Gather, Hop, Move
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import Schedule, Step, backward_schedule, forward_schedule
from megatron_wallfacer.schedule.tiles import Tile

LARGEST = 4096

Masks = dict[int, int]
"""Key chunks as bits, by query chunk."""


class Broken(AssertionError):
    """A schedule does not do what it must."""


class Programs(dict[int, Schedule]):
    """The schedules of all ranks for one pass, each built when asked for; a test may put another in its place."""

    def __init__(self, plan: Plan, *, backward: bool, causal: bool, q_kept: bool = False) -> None:
        super().__init__()
        self.plan, self.backward, self.causal, self.q_kept = plan, backward, causal, q_kept
        self.cp_size = plan.grid.cp_size
        self._split: dict[int, dict[str, tuple[list[Hop], list[Move]]]] = {}

    def __missing__(self, rank: int) -> Schedule:
        options = {"q_kept": self.q_kept} if self.backward else {}
        build = backward_schedule if self.backward else forward_schedule
        self[rank] = build(self.plan, rank, causal=self.causal, **options)
        return self[rank]

    def on(self, rank: int, group: str) -> tuple[list[Hop], list[Move]]:
        """The hops and the collectives of a rank over a group, in program order."""
        if rank not in self._split:
            self._split[rank] = {}
            for move in self[rank].moves:
                hops, collectives = self._split[rank].setdefault(channel(self, move), ([], []))
                (hops if isinstance(move, Hop) else collectives).append(move)
        return self._split[rank].get(group, ([], []))

    @property
    def ranks(self) -> range:
        return range(self.cp_size)


def chunks_of(ranks: Iterable[int], cp_size: int) -> list[int]:
    """Chunks of a block, by position: rank r holds r and 2P-1-r."""
    return sorted([*ranks, *(2 * cp_size - 1 - rank for rank in ranks)])


def live(q_chunk: int, k_chunks: int, causal: bool) -> tuple[int, int]:
    """Of these key chunks, those that a query chunk sees in full, and those of which it sees the lower triangle."""
    if not causal:
        return k_chunks, 0
    return k_chunks & ((1 << q_chunk) - 1), k_chunks & (1 << q_chunk)


def computed(step: Step, cp_size: int) -> tuple[Masks, Masks]:
    """What the tiles of a step compute: (full squares, lower triangles)."""
    q_chunks, k_chunks = chunks_of(step.q_ranks, cp_size), chunks_of(step.kv_ranks, cp_size)
    before = list(accumulate((1 << chunk for chunk in k_chunks), or_, initial=0))
    full, triangles = dict.fromkeys(q_chunks, 0), dict.fromkeys(q_chunks, 0)
    for tile in step.tiles:
        _check_inside(tile, len(q_chunks), len(k_chunks))
        first, end = tile.cols
        for row in range(*tile.rows):
            q_chunk = q_chunks[row]
            on = first + row - tile.rows[0]
            seen = before[on if tile.causal else end] ^ before[first]
            triangle = before[on + 1] ^ before[on] if tile.causal else 0
            if (full[q_chunk] | triangles[q_chunk]) & (seen | triangle):
                raise Broken(f"query chunk {q_chunk} meets a key chunk twice in one step: {step.tiles}")
            full[q_chunk] |= seen
            triangles[q_chunk] |= triangle
    return full, triangles


def _check_inside(tile: Tile, rows: int, cols: int) -> None:
    height, width = tile.rows[1] - tile.rows[0], tile.cols[1] - tile.cols[0]
    if tile.causal and height != width:
        raise Broken(f"a causal tile is not square: {tile}")
    if not (0 <= tile.rows[0] < tile.rows[1] <= rows and 0 <= tile.cols[0] < tile.cols[1] <= cols):
        raise Broken(f"a tile is empty or outside its block of {rows} x {cols} chunks: {tile}")


def check_step(step: Step, cp_size: int, causal: bool) -> None:
    """A step computes each live pair of its two blocks once, the diagonal as triangles, and nothing else."""
    keys = sum(1 << chunk for chunk in chunks_of(step.kv_ranks, cp_size))
    full, triangles = computed(step, cp_size)
    for q_chunk in full:
        if (full[q_chunk], triangles[q_chunk]) != live(q_chunk, keys, causal):
            raise Broken(f"query chunk {q_chunk} does not see the keys that it must: {step}")


def check_coverage(programs: Programs) -> None:
    """Over all ranks and steps, each live (query chunk, key chunk) pair is computed exactly once."""
    size = programs.cp_size
    full, triangles = dict.fromkeys(range(2 * size), 0), dict.fromkeys(range(2 * size), 0)
    for rank in programs.ranks:
        for step in programs[rank].steps:
            for total, part in zip((full, triangles), computed(step, size), strict=True):
                for q_chunk, mask in part.items():
                    if total[q_chunk] & mask:
                        raise Broken(f"query chunk {q_chunk}: rank {rank} computes again what was computed before")
                    total[q_chunk] |= mask
    everything = (1 << 2 * size) - 1
    for q_chunk in full:
        if (full[q_chunk], triangles[q_chunk]) != live(q_chunk, everything, programs.causal):
            raise Broken(f"query chunk {q_chunk} has not seen exactly the keys that it must")


def check_turn(programs: Programs, rank: int) -> None:
    """The ranks that share this rank's resident block see each shard of the rider exactly once between them.

    With this for every resident block, and :func:`check_step` for every step, coverage follows.
    """
    home = resident(programs[rank], 0)
    if rank not in home:
        raise Broken(f"rank {rank} does not hold its own shard: {home}")
    met: set[int] = set()
    for member in home:
        schedule = programs[member]
        for index in range(len(schedule.steps)):
            if sorted(resident(schedule, index)) != sorted(home):
                raise Broken(f"ranks {rank} and {member} should share a block at step {index}")
            block = rider(schedule, index)
            if not met.isdisjoint(block) or len(set(block)) != len(block):
                raise Broken(f"block {home} meets a shard of {block} twice")
            met.update(block)
    if met != set(programs.ranks):
        raise Broken(f"block {home} never meets the shards of {sorted(set(programs.ranks) - met)}")


def rider(schedule: Schedule, index: int) -> tuple[int, ...]:
    """Ranks of the block that moves, at a step."""
    step = schedule.steps[index]
    return step.kv_ranks if schedule.rider == "kv" else step.q_ranks


def resident(schedule: Schedule, index: int) -> tuple[int, ...]:
    """Ranks of the block that stays, at a step."""
    step = schedule.steps[index]
    return step.q_ranks if schedule.rider == "kv" else step.kv_ranks


def check_balance(programs: Programs, ranks: Iterable[int]) -> None:
    """These ranks do the same work as rank 0, and the same at every step."""
    areas = {sum(tile.area for tile in step.tiles) for rank in (0, *ranks) for step in programs[rank].steps}
    turns = {len(programs[rank].steps) for rank in (0, *ranks)}
    if len(areas) != 1 or len(turns) != 1:
        raise Broken(f"steps of work {sorted(areas)}, turns of {sorted(turns)} steps")


def channel(programs: Programs, move: Move) -> str:
    """The group over which a move goes: an axis that spans all ranks has the whole group for its own."""
    return "cp" if move.axis != "cp" and programs.plan.grid.size_of(move.axis) == programs.cp_size else move.axis


def check_moves(programs: Programs, rank: int, most_members: int = LARGEST) -> None:
    """Each move of this rank meets its counterpart on its peers, of the same payload and size.

    The n-th message from one rank to another over a group is the n-th that the other expects from it there; the
    n-th collective of a group is the same on all its members, of which the first ``most_members`` are asked.
    """
    for name in sorted({channel(programs, move) for move in programs[rank].moves}):
        group = set(programs.ranks if name == "cp" else programs.plan.grid.neighbours(rank, name))
        hops, collectives = programs.on(rank, name)
        for peer in {end for hop in hops for end in (hop.send_to, hop.recv_from)}:
            theirs, _ = programs.on(peer, name)
            _check_messages(rank, peer, hops, theirs)
            _check_messages(peer, rank, theirs, hops)
        for move in set(collectives):
            if rank not in move.ranks or len(set(move.ranks)) != len(move.ranks):
                raise Broken(f"rank {rank}: {move} is not of ranks that are with it")
            for peer in move.ranks[:most_members]:
                if programs.on(peer, name)[1] != collectives:
                    raise Broken(f"rank {rank} does not do the same over {name} as rank {peer}: {collectives}")
        if outside := _peers(hops, collectives) - group:
            raise Broken(f"rank {rank}: moves over {name} reach {outside}, outside its group {group}")


def _peers(hops: Iterable[Hop], collectives: Iterable[Move]) -> set[int]:
    ends = {end for hop in hops for end in (hop.send_to, hop.recv_from)}
    return ends | {member for move in collectives for member in move.ranks}


def _check_messages(sender: int, receiver: int, senders: Sequence[Hop], receivers: Sequence[Hop]) -> None:
    sent = [(hop.payload, hop.shards) for hop in senders if hop.send_to == receiver]
    expected = [(hop.payload, hop.shards) for hop in receivers if hop.recv_from == sender]
    if sent != expected or sender == receiver:
        raise Broken(f"rank {sender} sends {sent} to rank {receiver}, which expects {expected}")


def check_arrivals(programs: Programs, rank: int) -> None:
    """Each hop of the rider brings this rank the block that its next step names, from a rank that has it then."""
    schedule = programs[rank]
    hops = [move for move in schedule.prologue if isinstance(move, Hop)]
    arriving = [_home_block(programs[hop.recv_from]) for hop in hops] or [_home_block(schedule)]
    for index, step in enumerate(schedule.steps[:-1]):
        arriving.append(rider(programs[step.hop.recv_from], index) if step.hop else rider(schedule, index))
    for index, block in enumerate(arriving):
        if sorted(block) != sorted(rider(schedule, index)):
            raise Broken(f"rank {rank} has {block} at step {index}, which names {rider(schedule, index)}")
    if schedule.steps[-1].hop is not None:
        raise Broken(f"rank {rank}: the last step has a hop, which nobody needs")


def _home_block(schedule: Schedule) -> tuple[int, ...]:
    """The rider's block before anything hops: this rank's own shard, or what it gathers."""
    tensor = "k" if schedule.rider == "kv" else "dout"
    gathers = [move for move in schedule.prologue if isinstance(move, Gather) and tensor in move.payload]
    return gathers[0].ranks if gathers else (schedule.rank,)


def check_gradient_path(programs: Programs, home: int) -> None:
    """The gradient of ``home``'s block goes from holder to holder just behind the block, and then home.

    So it passes exactly the ranks that compute a part of it. Where the first holder is the home, the part
    computed there stays and the gradient starts from the second.
    """
    holders = _holders(programs, home)
    stays = programs[home].keeps_first
    if stays and holders[0] != home:
        raise Broken(f"rank {home} keeps the gradient of a block that is not its own")
    for index, (here, there) in enumerate(pairwise(holders)):
        sent, received = (programs[rank].steps[index + 1].grad_hop for rank in (here, there))
        if stays and index == 0:
            if (sent, received) != (None, None):
                raise Broken(f"the gradient of rank {home}'s block leaves home before step 2")
        elif sent is None or received is None or (sent.send_to, received.recv_from) != (there, here):
            raise Broken(f"the gradient of rank {home}'s block does not go from rank {here} to {there}: {sent}")
    exits = [move.send_to for move in programs[holders[-1]].epilogue if isinstance(move, Hop)]
    if (exits or [holders[-1]]) != [home]:
        raise Broken(f"the gradient of rank {home}'s block ends on {exits}")


def _holders(programs: Programs, home: int) -> list[int]:
    """The ranks that hold the block of ``home``, step by step."""
    block = sorted(_home_block(programs[home]))
    entry = [move.send_to for move in programs[home].prologue if isinstance(move, Hop)]
    holders = entry or [home]
    for index in range(len(programs[home].steps)):
        schedule = programs[holders[-1]]
        if sorted(rider(schedule, index)) != block:
            raise Broken(f"rank {schedule.rank} has the block of rank {home} at step {index}, which names another")
        hop = schedule.steps[index].hop
        if hop is not None:
            holders.append(hop.send_to)
    return holders
