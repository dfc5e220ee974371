"""An abstract machine: runs the programs of all ranks as the engine would, with the names of things for tensors.

An input is its tensors, its chunks and its head slice. An accumulator (partial output, gradient) is the set of pairs
that have been added to it. A rank waits only where it reads a value of a transfer that has not completed. The network
is the least helpful one: the transfers of a channel start strictly in the order in which a rank started them, a message
leaves only when its receiver has reached the transfer that receives it, and a transfer completes when all its messages
have arrived and left. A schedule that ends here ends on any network.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from megatron_wallfacer.schedule.mask import ChunkMask
from megatron_wallfacer.schedule.ops import (
    Accumulate,
    Attend,
    Concat,
    Message,
    Op,
    PostRecv,
    SendRecv,
    Transfer,
    Value,
    View,
    WriteResult,
)
from tests.schedule.proof import ENDS, KV, Q_SIDE, Broken, Names, Programs, chunks_of, computed, live, needs

Channel = tuple[str, str]
Results = dict[tuple[Names, int], "Sum"]
"""What a rank has stored, by (tensors, head slice)."""


@dataclass
class Sum:
    """What has gone into an accumulator.

    Attributes:
        payload, head_slice: which result, of which head slice.
        pairs: by chunk of this side, the chunks of the other side that it has met, as bits.
        fixed: chunks that were sent or stored, and must not be added to.
    """

    payload: Names
    head_slice: int
    pairs: dict[int, int]
    fixed: set[int] = field(default_factory=set)

    def add(self, pairs: dict[int, int]) -> None:
        """Count more pairs, each for the first time."""
        for chunk, mask in pairs.items():
            if mask and chunk in self.fixed:
                raise Broken(f"{self.payload} of chunk {chunk} is added to after it was sent or stored")
            if self.pairs[chunk] & mask:
                raise Broken(f"a pair is counted twice for {self.payload} of chunk {chunk}")
            self.pairs[chunk] |= mask

    def rows(self, chunks: tuple[int, ...]) -> Sum:
        """Some rows, as another rank gets them."""
        if missing := set(chunks) - self.pairs.keys():
            raise Broken(f"{self.payload} has no chunks {missing}")
        return Sum(self.payload, self.head_slice, {chunk: self.pairs[chunk] for chunk in chunks})

    @property
    def value(self) -> Value:
        return Value(self.payload, tuple(self.pairs), self.head_slice)


Content = Value | Sum


@dataclass(eq=False)
class Started:
    """A transfer that a rank has started, and the messages of it that have not met their counterparts."""

    rank: int
    transfer: Transfer
    to_send: dict[tuple[int, int], Message]
    to_receive: dict[tuple[int, int], Message]

    @property
    def done(self) -> bool:
        return not self.to_send and not self.to_receive


def _by_peer_and_tag(messages: tuple[Message, ...]) -> dict[tuple[int, int], Message]:
    found = {(message.peer, message.tag): message for message in messages}
    if len(found) != len(messages):
        raise Broken(f"messages between the same two ranks have the same tag: {messages}")
    return found


class Network:
    """Queues of transfers, one for each rank and channel; messages of transfers at the heads of their queues meet."""

    def __init__(self, ranks: list[Rank]) -> None:
        self._ranks = ranks
        self._queues: dict[tuple[int, Channel], deque[Started]] = {}

    def start(self, started: Started) -> None:
        queue = self._queues.setdefault((started.rank, started.transfer.channel), deque())
        queue.append(started)
        if queue[0] is started:
            self._meet([started])

    def left(self) -> list[tuple[int, Transfer]]:
        return [(started.rank, started.transfer) for queue in self._queues.values() for started in queue]

    def _head(self, rank: int, channel: Channel) -> Started | None:
        queue = self._queues.get((rank, channel))
        return queue[0] if queue else None

    def _meet(self, heads: list[Started]) -> None:
        """Exchange all messages that transfers at the heads of their queues can exchange, then those behind them."""
        while heads:
            here = heads.pop()
            channel = here.transfer.channel
            for peer, tag in list(here.to_send):
                self._try(here, self._head(peer, channel), tag)
            for peer, tag in list(here.to_receive):
                self._try(self._head(peer, channel), here, tag)
            heads += self._advance(
                channel, {here.rank, *(m.peer for m in (*here.transfer.sends, *here.transfer.receives))}
            )

    def _advance(self, channel: Channel, ranks: set[int]) -> list[Started]:
        """Transfers whose turn has come because the one before them is done."""
        come = []
        for rank in ranks:
            queue = self._queues.get((rank, channel))
            if queue and queue[0].done:
                while queue and queue[0].done:
                    queue.popleft()
                come += [queue[0]] if queue else []
        return come

    def _try(self, sender: Started | None, receiver: Started | None, tag: int) -> None:
        if sender is None or receiver is None:
            return
        there, back = (receiver.rank, tag), (sender.rank, tag)
        if (
            there in sender.to_send
            and back in receiver.to_receive
            and sender.transfer.payload == receiver.transfer.payload
        ):
            sent, received = sender.to_send.pop(there), receiver.to_receive.pop(back)
            content = self._ranks[sender.rank].sent(sent, sender.transfer.payload)
            self._ranks[receiver.rank].arrive(received, content)


class Rank:
    """One rank: where it is in its program, and what its names have."""

    def __init__(self, programs: Programs, rank: int) -> None:
        self.schedule, self.rank, self._programs = programs[rank], rank, programs
        self.results: Results = {}
        # What forward kept is what its name says: forward was played, and there every name was checked.
        self._held: dict[str, Content] = {name: self.schedule.values[name] for name in self.schedule.given}
        self._bringing: dict[str, Started] = {}
        self._at = 0

    @property
    def ended(self) -> bool:
        return self._at == len(self.schedule.ops)

    @property
    def next_op(self) -> Op:
        return self.schedule.ops[self._at]

    def run(self, network: Network) -> bool:
        """Go on until the next wait or the end; whether anything was done."""
        begun = self._at
        while not self.ended and not any(self._is_waited_for(name) for name in needs(self.next_op)):
            self._do(self.next_op, network)
            self._at += 1
        return self._at > begun

    def _is_waited_for(self, name: str) -> bool:
        """Whether it is still on its way. What has been waited for has arrived with all that its transfer brings."""
        if name not in self._bringing:
            return False
        started = self._bringing[name]
        if started.done:
            for message in started.transfer.receives:
                del self._bringing[message.value]
        return not started.done

    # --- the two ends of a message ---

    def sent(self, message: Message, payload: Names) -> Content:
        """What leaves: rows of what a name has at the last moment."""
        content = self._held[message.value]
        if isinstance(content, Sum):
            return content.rows(message.chunks)
        if payload != content.payload or not set(message.chunks) <= set(content.chunks):
            raise Broken(f"rank {self.rank} sends {payload} of {message}, and has {content}")
        return Value(payload, message.chunks, content.head_slice)

    def arrive(self, message: Message, content: Content) -> None:
        self._name(message.value, content)

    # --- operations ---

    def _do(self, op: Op, network: Network) -> None:
        match op:
            case View():
                value = self.schedule.values[op.into]
                own = tuple(chunks_of([self.rank], self._programs.cp_size))
                self._name(op.into, Value(value.payload, own, value.head_slice))
            case Concat():
                self._name(op.into, self._concatenated(op))
            case SendRecv():
                self._start(op.transfer, network)
            case Attend():
                self._attend(op)
            case Accumulate():
                self._accumulate(op)
            case WriteResult():
                for source in op.sources:
                    self._store(source)
            case PostRecv():
                pass

    def _get(self, name: str) -> Content:
        if name not in self._held:
            raise Broken(f"rank {self.rank}: {self.next_op} reads {name}, which does not exist")
        return self._held[name]

    def _name(self, name: str, content: Content) -> None:
        """Give a name its value, which must be what the schedule says that it is."""
        found = content.value if isinstance(content, Sum) else content
        if found != self.schedule.values[name]:
            raise Broken(f"rank {self.rank}: {name} should be {self.schedule.values[name]}, it is {found}")
        if name in self._held:
            raise Broken(f"rank {self.rank}: {name} is made twice")
        self._held[name] = content

    def _sum(self, name: str) -> Sum:
        """An accumulator; it is nothing before something is added to it for the first time."""
        if name in self._bringing:
            raise Broken(f"rank {self.rank}: {name} is added to while it is on its way")
        if name not in self._held:
            value = self.schedule.values[name]
            self._held[name] = Sum(value.payload, value.head_slice, dict.fromkeys(value.chunks, 0))
        found = self._held[name]
        if not isinstance(found, Sum):
            raise Broken(f"rank {self.rank}: {name} is added to, and is an input")
        return found

    def _concatenated(self, op: Concat) -> Content:
        """Rows of the sources by position; sums as they are now."""
        sources = [self._get(name) for name in op.sources]
        kinds = {(type(source), source.payload, source.head_slice) for source in sources}
        if len(kinds) != 1:
            raise Broken(f"rank {self.rank}: {op} is of different things {kinds}")
        kind, payload, head_slice = kinds.pop()
        if kind is Sum:
            pairs = [item for source in sources for item in source.pairs.items()]
            return Sum(payload, head_slice, dict(sorted(pairs)))
        return Value(payload, tuple(sorted(chunk for source in sources for chunk in source.chunks)), head_slice)

    def _start(self, transfer: Transfer, network: Network) -> None:
        for message in transfer.sends:
            content = self._get(message.value)
            if isinstance(content, Sum):
                content.fixed.update(message.chunks)
        started = Started(self.rank, transfer, _by_peer_and_tag(transfer.sends), _by_peer_and_tag(transfer.receives))
        self._bringing |= {message.value: started for message in transfer.receives}
        network.start(started)

    def _attend(self, op: Attend) -> None:
        queries = self._side(op, op.q, Q_SIDE[self._programs.backward])
        keys = self._side(op, op.kv, KV)
        if queries.head_slice != keys.head_slice:
            slices = f"head slice {queries.head_slice} meet keys of head slice {keys.head_slice}"
            raise Broken(f"rank {self.rank}: queries of {slices}")
        full, triangles = computed(self.schedule, op)
        pairs = {chunk: full[chunk] | triangles[chunk] for chunk in full}
        self._count(op.q_into, pairs, queries)
        if op.kv_into is not None:
            self._count(op.kv_into, _transposed(pairs, keys.chunks), keys)

    def _side(self, op: Attend, names: Names, wanted: Names) -> Value:
        """What the values of one side are together."""
        values = [self._get(name) for name in names]
        if any(isinstance(value, Sum) for value in values) or len({(v.chunks, v.head_slice) for v in values}) != 1:
            raise Broken(f"rank {self.rank}: {op} is of different rows or heads: {values}")
        found = {tensor for value in values for tensor in value.payload}
        if not set(wanted) <= found:
            raise Broken(f"rank {self.rank}: {op} has {sorted(found)} and needs {wanted}")
        return values[0]

    def _count(self, name: str, pairs: dict[int, int], of: Value) -> None:
        total = self._sum(name)
        if not of.chunks or not set(of.chunks) <= total.pairs.keys() or total.head_slice != of.head_slice:
            raise Broken(f"rank {self.rank}: results of {of} are added to {name}, which is {total.value}")
        total.add(pairs)

    def _accumulate(self, op: Accumulate) -> None:
        source, into = self._get(op.source), self._sum(op.into)
        if not isinstance(source, Sum) or (source.payload, source.head_slice) != (into.payload, into.head_slice):
            raise Broken(f"rank {self.rank}: {op} adds {source} to {into}")
        into.add({chunk: mask for chunk, mask in source.pairs.items() if chunk in into.pairs})

    def _store(self, name: str) -> None:
        total = self._get(name)
        if not isinstance(total, Sum) or (total.payload, total.head_slice) in self.results:
            raise Broken(f"rank {self.rank} stores {name} again, or an input")
        own = chunks_of([self.rank], self._programs.cp_size)
        if not set(own) <= set(total.pairs):
            raise Broken(f"rank {self.rank} stores chunks {sorted(total.pairs)} of {total.payload}, its own are {own}")
        total.fixed.update(own)
        self.results[total.payload, total.head_slice] = total.rows(tuple(own))


def play(programs: Programs) -> list[Results]:
    """Run all ranks to their end: what each has stored.

    Raises:
        Broken: ranks wait for each other for ever, hold what their program does not name, or count twice.
    """
    ranks: list[Rank] = []
    network = Network(ranks)
    ranks += [Rank(programs, rank) for rank in programs.ranks]
    running = ranks
    while running:
        if not any([rank.run(network) for rank in running]):
            raise Broken(f"stuck: { ({rank.rank: rank.next_op for rank in running}) }, left: {network.left()}")
        running = [rank for rank in running if not rank.ended]
    if left := network.left():
        raise Broken(f"started and never met: {left}")
    return [rank.results for rank in ranks]


def check_play(programs: Programs) -> None:
    """Every rank comes to its end, with the output or the gradients of its own chunks, complete, of all heads."""
    everything = (1 << 2 * programs.cp_size) - 1
    wanted = {
        (payload, head_slice) for payload in ENDS[programs.backward] for head_slice in range(programs.head_slices)
    }
    for rank, results in enumerate(play(programs)):
        if results.keys() != wanted:
            raise Broken(f"rank {rank} ends with {list(results)}")
        for (payload, head_slice), total in results.items():
            for chunk, pairs in total.pairs.items():
                if pairs != _wanted(payload, chunk, everything, programs):
                    raise Broken(
                        f"rank {rank}, {payload} of chunk {chunk}, head slice {head_slice}: the sum is not complete"
                    )


def _wanted(payload: Names, chunk: int, everything: int, programs: Programs) -> int:
    if payload == ("dk", "dv") and isinstance(programs.causal, ChunkMask):
        return sum(1 << q for q, (first, end) in enumerate(programs.causal.nonempty) if first <= chunk < end)
    if payload == ("dk", "dv"):
        return everything if not programs.causal else everything >> chunk << chunk
    full, triangle = live(chunk, everything, programs.causal)
    return full | triangle


def _transposed(pairs: dict[int, int], k_chunks: tuple[int, ...]) -> dict[int, int]:
    found = dict.fromkeys(k_chunks, 0)
    for q_chunk, mask in pairs.items():
        for k_chunk in k_chunks:
            if mask >> k_chunk & 1:
                found[k_chunk] |= 1 << q_chunk
    return found
