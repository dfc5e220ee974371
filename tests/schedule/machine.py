"""An abstract machine: runs the programs of all ranks as the engine would, with the names of things for tensors.

A block is the ranks whose shards it is made of. A sum (partial output, gradient) is the set of pairs that have
gone into it. Moves are posted and waited for at the points where ``engine/forward.py`` and ``engine/backward.py`` do.
The network is the least helpful one: the moves of a group start strictly in the order in which a rank posted
them, and a message leaves only when its receiver has come to that very receive. What ends here ends anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_wallfacer.schedule.moves import DKV, KV, Q_BACKWARD, Combine, Gather, Hop, Move, Q, Reduce
from megatron_wallfacer.schedule.schedule import Schedule, Step
from tests.schedule.proof import Broken, Programs, channel, chunks_of, computed, live

Block = tuple[int, ...]
Results = dict[str, "Sum"]
INPUTS = {"q": Q_BACKWARD, "kv": KV}


@dataclass
class Sum:
    """What has gone into an accumulator.

    Attributes:
        parts: by chunk of this side, the chunks of the other side that it has met, as bits.
        sources: the ranks that computed a part of it.
        holders: the ranks on which it has been.
        sent: it is on its way, and must not be added to.
    """

    parts: dict[int, int]
    sources: set[int] = field(default_factory=set)
    holders: set[int] = field(default_factory=set)
    sent: bool = False

    def add(self, parts: dict[int, int]) -> None:
        if self.sent:
            raise Broken("a sum is added to while it is being sent")
        if parts.keys() != self.parts.keys():
            raise Broken(f"sums of different chunks are added: {sorted(self.parts)} and {sorted(parts)}")
        for chunk, mask in parts.items():
            if self.parts[chunk] & mask:
                raise Broken(f"a pair is counted twice for chunk {chunk}")
            self.parts[chunk] |= mask

    def merge(self, other: Sum) -> None:
        self.add(other.parts)
        if self.sources & other.sources:
            raise Broken(f"parts of ranks {self.sources & other.sources} are counted twice")
        self.sources |= other.sources
        self.holders |= other.holders

    def shard(self, rank: int, cp_size: int) -> Sum:
        own = {chunk: self.parts[chunk] for chunk in chunks_of([rank], cp_size)}
        return Sum(own, set(self.sources), set(self.holders))


@dataclass(eq=False)
class Posted:
    """A move that a rank has started."""

    move: Move
    content: Any
    sent: bool = False
    received: bool = False
    arrived: Any = None

    @property
    def done(self) -> bool:
        return self.sent and self.received


Post = Callable[[Move, Any], Posted]
Program = Generator[Posted, None, Results]


def play(programs: Programs) -> list[Results]:
    """Run all ranks to their end: what each has in its accumulators.

    Raises:
        Broken: ranks wait for each other for ever, or hold what their program does not name, or count twice.
    """
    queues: dict[tuple[int, str], deque[Posted]] = {}

    def post_on(rank: int) -> Post:
        def post(move: Move, content: Any) -> Posted:
            posted = Posted(move, content)
            queues.setdefault((rank, channel(programs, move)), deque()).append(posted)
            return posted

        return post

    running = {rank: _program(programs, rank, post_on(rank)) for rank in programs.ranks}
    waits: dict[int, Posted | None] = dict.fromkeys(running)
    results: dict[int, Results] = {}
    while running:
        ready = [rank for rank in running if waits[rank] is None or waits[rank].done]
        for rank in ready:
            try:
                waits[rank] = next(running[rank])
            except StopIteration as end:
                results[rank] = end.value
                del running[rank]
        if not _deliver(queues, programs.cp_size) and not ready:
            raise Broken(f"stuck: { ({rank: waits[rank].move for rank in running}) }")
    if left := {key: [posted.move for posted in queue] for key, queue in queues.items() if queue}:
        raise Broken(f"started and never met: {left}")
    return [results[rank] for rank in programs.ranks]


def check_play(programs: Programs) -> None:
    """Every rank comes to its end, with the output or the gradients of its own shard, complete."""
    everything = (1 << 2 * programs.cp_size) - 1
    for rank, results in enumerate(play(programs)):
        if results.keys() != ({"q", "kv"} if programs.backward else {"q"}):
            raise Broken(f"rank {rank} ends with {list(results)}")
        for side, total in results.items():
            for chunk in chunks_of([rank], programs.cp_size):
                if total.parts.get(chunk) != _wanted(side, chunk, everything, programs):
                    raise Broken(f"rank {rank}, {side} chunk {chunk}: the sum is not complete")
            if len(total.parts) != 2:
                raise Broken(f"rank {rank} ends with chunks {sorted(total.parts)} of {side}")


def _wanted(side: str, chunk: int, everything: int, programs: Programs) -> int:
    if side == "kv":
        return everything if not programs.causal else everything >> chunk << chunk
    full, triangle = live(chunk, everything, programs.causal)
    return full | triangle


def _deliver(queues: dict[tuple[int, str], deque[Posted]], cp_size: int) -> bool:
    """Let everything happen that can happen now; whether anything did."""
    happened = False
    for (rank, name), queue in queues.items():
        while queue and _try(queues, queue[0], rank, name, cp_size):
            happened = True
            while queue and queue[0].done:
                queue.popleft()
    return happened


def _try(queues: dict[tuple[int, str], deque[Posted]], posted: Posted, rank: int, name: str, cp_size: int) -> bool:
    move = posted.move
    if posted.done:
        return True
    if isinstance(move, Hop):
        theirs = _head(queues, move.send_to, name)
        if posted.sent or theirs is None or theirs.received or not isinstance(theirs.move, Hop):
            return False
        if (theirs.move.recv_from, theirs.move.payload, theirs.move.shards) != (rank, move.payload, move.shards):
            return False
        posted.sent, theirs.received, theirs.arrived = True, True, posted.content
        return True
    heads = [_head(queues, member, name) for member in move.ranks]
    if any(head is None or head.move != move for head in heads):
        return False
    for member, head in zip(move.ranks, heads, strict=True):
        head.sent = head.received = True
        head.arrived = _collected(move, [theirs.content for theirs in heads], member, cp_size)
    return True


def _head(queues: dict[tuple[int, str], deque[Posted]], rank: int, name: str) -> Posted | None:
    queue = queues.get((rank, name))
    while queue and queue[0].done:
        queue.popleft()
    return queue[0] if queue else None


def _collected(move: Move, contents: Sequence[Any], member: int, cp_size: int) -> Any:
    if isinstance(move, Gather):
        if any(content != (rank,) for content, rank in zip(contents, move.ranks, strict=True)):
            raise Broken(f"a gather of {contents} is not one of own shards: {move}")
        return move.ranks
    shards = [content.shard(member, cp_size) for content in contents]
    for shard in shards[1:]:
        shards[0].merge(shard)
    return shards[0]


def _program(programs: Programs, rank: int, post: Post) -> Program:
    schedule, size = programs[rank], programs.cp_size
    if not programs.backward:
        return _forward(schedule, size, post)
    local = {"q": programs.plan.grid.neighbours(rank, "team") if programs.q_kept else (rank,)}
    return _backward(schedule, size, post, local)


class _Arrivals:
    """As in ``engine/runtime.py``."""

    def __init__(self, local: dict[str, Block], rank: int) -> None:
        self._at_hand, self._rank, self._on_the_way = local, rank, {}

    def start(self, prologue: Iterable[Move], post: Post) -> Generator[Posted, None, None]:
        for move in prologue:
            block = yield from self.take(move.payload)
            self._on_the_way[move.payload] = post(move, block)

    def take(self, names: Sequence[str]) -> Generator[Posted, None, Block]:
        for payload in [payload for payload in self._on_the_way if not set(payload).isdisjoint(names)]:
            posted = self._on_the_way.pop(payload)
            yield posted
            self._at_hand.update(dict.fromkeys(payload, posted.arrived))
        blocks = {self._at_hand.get(name, (self._rank,)) for name in names}
        if len(blocks) != 1:
            raise Broken(f"rank {self._rank}: {names} are of different blocks {blocks}")
        return blocks.pop()


def _forward(schedule: Schedule, size: int, post: Post) -> Program:
    arrivals = _Arrivals({}, schedule.rank)
    yield from arrivals.start(schedule.prologue, post)
    keys = yield from arrivals.take(KV)
    out = _zero(schedule.steps[0].q_ranks, size)
    for index, step in enumerate(schedule.steps):
        incoming = post(step.hop, keys) if step.hop else None
        queries = yield from arrivals.take(Q)
        _check_named(schedule, index, queries, keys)
        _compute(step, size, schedule.rank, out, None)
        if incoming is not None:
            yield incoming
            keys = incoming.arrived
    for move in schedule.epilogue:
        if not isinstance(move, Combine):
            raise Broken(f"the forward epilogue has a {move}")
        combine = post(move, out)
        yield combine
        out = combine.arrived
    return {"q": out}


def _backward(schedule: Schedule, size: int, post: Post, local: dict[str, Block]) -> Program:
    arrivals = _Arrivals(local, schedule.rank)
    yield from arrivals.start(schedule.prologue, post)
    riding = schedule.rider
    staying = "q" if riding == "kv" else "kv"
    blocks = {riding: (yield from arrivals.take(INPUTS[riding]))}
    grads: dict[str, Sum] = {}
    kept = travelling = None
    for index, step in enumerate(schedule.steps):
        incoming = post(step.hop, blocks[riding]) if step.hop else None
        arriving = post(step.grad_hop, _send(travelling)) if step.grad_hop else None
        if index == 0:
            blocks[staying] = yield from arrivals.take(INPUTS[staying])
            grads[staying] = _zero(blocks[staying], size)
        grads[riding] = _zero(blocks[riding], size)
        _check_named(schedule, index, blocks["q"], blocks["kv"])
        _compute(step, size, schedule.rank, grads["q"], grads["kv"])
        if arriving is not None:
            yield arriving
            grads[riding].merge(_arrive(arriving.arrived, [schedule.rank]))
        if index == 0 and schedule.keeps_first:
            kept = grads[riding]
        else:
            travelling = grads[riding]
        if incoming is not None:
            yield incoming
            blocks[riding] = incoming.arrived
    grads[riding] = travelling if kept is None else kept
    return (yield from _bring_home(schedule, post, grads, travelling))


def _bring_home(schedule: Schedule, post: Post, grads: dict[str, Sum], travelling: Sum | None) -> Program:
    for move in schedule.epilogue:
        side = "kv" if move.payload == DKV else "q"
        hops = isinstance(move, Hop)
        if not hops and not isinstance(move, Reduce):
            raise Broken(f"the backward epilogue has a {move}")
        posted = post(move, _send(travelling) if hops else grads[side])
        yield posted
        if not hops:
            grads[side] = posted.arrived
        elif schedule.keeps_first:
            grads[side].merge(_arrive(posted.arrived, []))
        else:
            grads[side] = _arrive(posted.arrived, [])
    return grads


def _send(total: Sum | None) -> Sum:
    if total is None or total.sent:
        raise Broken("a gradient is sent that does not exist, or is sent twice")
    if total.holders != total.sources:
        raise Broken(f"a gradient of ranks {total.sources} has been on ranks {total.holders}")
    total.sent = True
    return total


def _arrive(total: Sum, here: Iterable[int]) -> Sum:
    """The sum as its next holder has it."""
    return Sum(dict(total.parts), set(total.sources), total.holders | set(here))


def _zero(ranks: Block, size: int) -> Sum:
    return Sum(dict.fromkeys(chunks_of(ranks, size), 0))


def _check_named(schedule: Schedule, index: int, queries: Block, keys: Block) -> None:
    step = schedule.steps[index]
    if (sorted(queries), sorted(keys)) != (sorted(step.q_ranks), sorted(step.kv_ranks)):
        raise Broken(f"rank {schedule.rank} has {queries} and {keys} at hand at step {index}, which names {step}")


def _compute(step: Step, size: int, rank: int, q_side: Sum, kv_side: Sum | None) -> None:
    full, triangles = computed(step, size)
    pairs = {chunk: full[chunk] | triangles[chunk] for chunk in full}
    sums = [(q_side, pairs)] + ([] if kv_side is None else [(kv_side, _transposed(pairs, kv_side.parts))])
    for total, parts in sums:
        total.add(parts)
        if any(parts.values()):
            total.sources.add(rank)
            total.holders.add(rank)


def _transposed(pairs: dict[int, int], k_chunks: Iterable[int]) -> dict[int, int]:
    return {k: sum(1 << q for q, mask in pairs.items() if mask >> k & 1) for k in k_chunks}
