"""Plays schedules on a cluster on paper: a discrete-event simulation in which links are shared as they are.

Each rank runs its operations one after the other, as the engine does, and waits for a move where it first reads what
that brings. A message flows once both of its ends are there. One rank of each class is played
(:mod:`megatron_wallfacer.planning.symmetry`).
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from megatron_wallfacer.planning.costs import Cost, Costs
from megatron_wallfacer.planning.fluid import Fluid, Uses
from megatron_wallfacer.planning.network import Network, Resource
from megatron_wallfacer.planning.processors import Lateness, overhead_s
from megatron_wallfacer.planning.program import Line, write_program
from megatron_wallfacer.planning.symmetry import Symmetry
from megatron_wallfacer.schedule.ops import Expect, Move, Op, Schedule, Start
from megatron_wallfacer.schedule.volume import rows_bytes

CORES = "cores"
Channel = tuple[str, str]


@dataclass(frozen=True)
class Span:
    """Something that a rank did.

    Attributes:
        rank: which.
        what: ``pass``, ``kernel``, ``copy`` (merging and packing), ``wait`` or ``move``.
        name: of the operation; of a move its axis and tensors; of a pass ``forward`` or ``backward``.
        start_s, end_s: when.
    """

    rank: int
    what: str
    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Played:
    """What came of it.

    Attributes:
        seconds: until the last rank had done all passes.
        pass_s: until the last rank had done each pass.
        kernel_s: of kernels, the rank that had most.
        ranks: that were played.
        link_bytes: by link, of one of each kind, what the ranks that were played move over it.
        spans: what every played rank did.
    """

    seconds: float
    pass_s: tuple[float, ...]
    kernel_s: float
    ranks: int
    link_bytes: Counter[Resource]
    spans: tuple[Span, ...]

    @property
    def exposed_s(self) -> float:
        """Time that is not kernels."""
        return self.seconds - self.kernel_s


class Stuck(RuntimeError):
    """Ranks wait for messages that nobody sends: the schedules do not fit each other."""


def play(
    costs: Costs,
    schedules: Callable[[int], Sequence[Schedule]],
    symmetry: Symmetry,
    *,
    spans: bool = False,
    draw: int = 0,
) -> Played:
    """Play the passes of an attention layer.

    Args:
        costs: of operations; their cluster has at least as many devices as there are ranks.
        schedules: of a rank, its passes in order.
        symmetry: which ranks stand for which.
        spans: note what happens when.
        draw: which of many possible runs, where it is left to chance who has to wait for a processor.

    Raises:
        Stuck: the ranks of a class are not alike after all, or the schedules are wrong.
    """
    return _Play(costs, schedules, symmetry, spans, draw).run()


@dataclass(eq=False, slots=True)
class _Pending:
    """A move of a rank: how many of its messages are still on their way."""

    rank: _Rank
    move: Move
    left: int
    start_s: float = 0.0


@dataclass(eq=False, slots=True)
class _Rank:
    """One rank's place in its program, which is written as of its twin."""

    number: int
    twin: int
    program: list[Line]
    at: int = 0
    pass_since: float = 0.0
    busy: bool = False
    paid: bool = False
    waits_since: float | None = None
    coming: dict[str, _Pending] = field(default_factory=dict)
    open_moves: list[_Pending] = field(default_factory=list)
    queues: dict[Channel, deque[Callable[[], _Pending]]] = field(default_factory=lambda: defaultdict(deque))
    running: dict[Channel, _Pending] = field(default_factory=dict)
    kernel_s: float = 0.0


class _Play:
    def __init__(
        self,
        costs: Costs,
        schedules: Callable[[int], Sequence[Schedule]],
        symmetry: Symmetry,
        spans: bool,
        draw: int,
    ) -> None:
        self._cluster, self._shape, self._symmetry = costs.cluster, costs.shape, symmetry
        self._network, cluster = Network(costs.cluster), costs.cluster
        twins = {rank: symmetry.twin(rank) for rank in symmetry.representatives}
        programs = {twin: write_program(schedules(twin), costs) for twin in sorted(set(twins.values()))}
        self._ranks = {rank: _Rank(rank, twin, programs[twin]) for rank, twin in twins.items()}
        self._fluid = Fluid({CORES: float(cluster.host.cores)} if cluster.host else {})
        large = cluster.host.messages[-1:] if cluster.host else ()
        self._byte_s = sum(one.transport_us * 1e-6 / one.size for one in large) or 1.0
        self._lateness = Lateness(cluster.host, draw) if cluster.host and cluster.host.late_us else None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self._now = 0.0
        self._ends: dict[Hashable, dict[str, _Pending]] = {}
        self._passes: dict[int, float] = {}
        self._keep_spans = spans
        self._spans: list[Span] = []
        # Links go by number: their hash is wanted at every moment.
        self._links: dict[Resource, int] = {}
        self._link_bytes: Counter[int] = Counter()
        self._routes: dict[tuple[int, int], tuple[Uses, tuple[int, ...]]] = {}

    def run(self) -> Played:
        for rank in self._ranks.values():
            self._advance(rank)
        while self._step():
            pass
        late = [rank for rank in self._ranks.values() if rank.at < len(rank.program)]
        if late:
            raise Stuck(f"ranks {[rank.number for rank in late]} wait for messages that nobody sends")
        return Played(
            seconds=self._now,
            pass_s=tuple(self._passes[number] for number in sorted(self._passes)),
            kernel_s=max(rank.kernel_s for rank in self._ranks.values()),
            ranks=len(self._ranks),
            link_bytes=Counter({link: self._link_bytes[number] for link, number in self._links.items()}),
            spans=tuple(self._spans),
        )

    # --- time ---

    def _step(self) -> bool:
        """Go to the next moment at which something happens; False if nothing will."""
        flow_in = self._fluid.next_end_s()
        event_in = self._events[0][0] - self._now if self._events else None
        soonest = min((t for t in (flow_in, event_in) if t is not None), default=None)
        if soonest is None:
            return False
        ended = self._fluid.pass_time(max(0.0, soonest))
        self._now = self._events[0][0] if soonest == event_in else self._now + soonest
        for then in ended:
            then()
        while self._events and self._events[0][0] <= self._now:
            heapq.heappop(self._events)[2]()
        return True

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._number), then))

    # --- one rank ---

    def _advance(self, rank: _Rank) -> None:
        """As far as it comes without time passing."""
        while rank.at < len(rank.program) and not rank.busy:
            line = rank.program[rank.at]
            if self._waits(rank, line):
                return
            if not rank.paid:
                rank.paid = True
                self._pay_when_issued(rank, line)
                continue
            rank.paid = False
            rank.at += 1
            self._take_effect(rank, line.number, line.schedule, line.op)
            self._write_out(rank, line.cost)

    def _waits(self, rank: _Rank, line: Line) -> bool:
        """Whether it has to wait for a move; at the end of a pass for all of them."""
        coming = rank.coming
        if line.op is None:
            waiting = any(pending.left for pending in rank.open_moves)
        else:
            waiting = any(name in coming and coming[name].left for name in line.reads)
        if waiting and rank.waits_since is None:
            rank.waits_since = self._now
        if not waiting and rank.waits_since is not None:
            self._note(rank, "wait", "" if line.op is None else type(line.op).__name__, rank.waits_since)
            rank.waits_since = None
        return waiting

    def _pay_when_issued(self, rank: _Rank, line: Line) -> None:
        """An operation takes its time once the host has issued it: the host may be slower than the device."""
        lag_s = rank.pass_since + line.begun_s - self._now
        if lag_s <= 0:
            self._pay(rank, line)
            return

        def issued() -> None:
            rank.busy = False
            self._pay(rank, line)
            self._advance(rank)

        rank.busy = True
        self._after(lag_s, issued)

    def _pay(self, rank: _Rank, line: Line) -> None:
        """Let the time of an operation pass."""
        op, cost = line.op, line.cost
        host, memory = self._cluster.host, self._cluster.device.memory_gbyte_s
        work_s = 0.0
        if host is not None:
            work_s = cost.touched / (host.copy_gbyte_s * 1e9) + overhead_s(host, op)
        else:
            work_s = cost.launch_s + (0.0 if memory is None else cost.touched / (memory * 1e9))
        if not cost.kernel_s and not work_s:
            return
        rank.busy, rank.kernel_s = True, rank.kernel_s + cost.kernel_s
        start, name = self._now, type(op).__name__

        def computed() -> None:
            self._note(rank, "kernel", name, start)
            self._work(rank, name, work_s)

        if cost.kernel_s:
            # Of several calls the last may not be issued yet when the others have ended.
            kernel_s = max(cost.kernel_s, rank.pass_since + line.issued_s - start)
            self._after(kernel_s, lambda: self._when_served(computed, len(op.tiles)))
        else:
            computed()

    def _when_served(self, then: Callable[[], None], sleeps: int = 1) -> None:
        """When somebody who has slept, so often in a row, has a processor: a rank, or a thread that receives for it."""
        if self._lateness is None:
            then()
        else:
            self._after(self._lateness.seconds(self._fluid.used(CORES), sleeps), then)

    def _write_out(self, rank: _Rank, cost: Cost) -> None:
        """Gloo begins to write in the thread that sends; what the sockets do not take its own thread writes later."""
        host = self._cluster.host
        if host is not None and (work_s := 1e-6 * sum(host.message(size).thread_us for size in cost.sends)):
            self._work(rank, Start.__name__, work_s)

    def _work(self, rank: _Rank, name: str, work_s: float) -> None:
        """Keep a rank busy for so long, of a processor where those are shared.

        Flows rise together, and a processor is shared evenly among those that work and those that receive: work is
        counted in bytes that would take as long.
        """
        rank.busy, start = True, self._now

        def done() -> None:
            self._note(rank, "copy", name, start)
            rank.busy = False
            self._advance(rank)

        if not work_s:
            done()
        elif self._cluster.host is None:
            self._after(work_s, done)
        else:
            byte_s = self._byte_s
            self._fluid.add(work_s / byte_s, self._on_cores(rank.number, byte_s), done, limit=1 / byte_s)

    def _take_effect(self, rank: _Rank, number: int, schedule: Schedule, op: Op | None) -> None:
        match op:
            case None:
                rank.coming.clear()
                rank.open_moves.clear()
                self._note(rank, "pass", "backward" if schedule.backward else "forward", rank.pass_since)
                rank.pass_since = self._now
                self._passes[number] = max(self._passes.get(number, 0.0), self._now)
            case Expect(move=move):
                if self._cluster.transport == "gloo":
                    self._begin(rank, number, schedule, move, ends=("receive",))
            case Start(move=move):
                self._begin(rank, number, schedule, move, ends=("receive", "send"))

    # --- moves ---

    def _begin(self, rank: _Rank, number: int, schedule: Schedule, move: Move, ends: Iterable[str]) -> None:
        known = next((one for one in rank.open_moves if one.move is move), None)
        pending = known or _Pending(rank, move, len(move.sends) + len(move.receives), self._now)
        if known is None:
            rank.open_moves.append(pending)
        rank.coming |= {message.value: pending for message in move.receives}
        ready = [end for end in ends if not (known is not None and end == "receive")]
        if self._cluster.transport == "gloo":
            self._post(rank, number, schedule, pending, ready)
            return
        rank.queues[move.channel].append(lambda: self._post(rank, number, schedule, pending, ready))
        self._next_of(rank, move.channel)

    def _next_of(self, rank: _Rank, channel: Channel) -> None:
        """NCCL runs the moves of a group one after the other; inputs and results of an axis have a group each."""
        running = rank.running.get(channel)
        if running is not None and running.left:
            return
        while rank.queues[channel]:
            rank.running[channel] = rank.queues[channel].popleft()()
            if rank.running[channel].left:
                return

    def _post(self, rank: _Rank, number: int, schedule: Schedule, pending: _Pending, ends: Iterable[str]) -> _Pending:
        """The ends of a move's messages are there; a message whose other end is there too begins to flow."""
        move, alike = pending.move, self._symmetry
        for end in ends:
            for message in move.sends if end == "send" else move.receives:
                peer = alike.moved(message.peer, rank.twin, rank.number)
                source, target = (rank.number, peer) if end == "send" else (peer, rank.number)
                key = (number, alike.class_of(source), alike.offset(source, target), message.tag)
                both = self._ends.setdefault(key, {})
                both[end] = pending
                if len(both) == 2:
                    del self._ends[key]
                    size = rows_bytes(schedule, self._shape, move.payload, len(message.chunks))
                    self._after(self._network.latency_s(source, target), self._flowing(source, target, size, both))
        return pending

    def _flowing(self, source: int, target: int, size: float, both: dict[str, _Pending]) -> Callable[[], None]:
        host = self._cluster.host

        def begin() -> None:
            uses, links = self._route(source, target)
            for link in links:
                self._link_bytes[link] += size
            if host is not None and size:
                uses += self._on_cores(target, host.message(size).transport_us * 1e-6 / size)
            through = partial(self._when_served, partial(self._arrived, both))
            self._fluid.add(size, uses, through) if uses else through()

        return begin

    def _arrived(self, both: dict[str, _Pending]) -> None:
        for pending in both.values():
            pending.left -= 1
        # Both ends may be of one move, of a rank that stands for its own peer.
        for pending in {id(pending): pending for pending in both.values()}.values():
            if not pending.left:
                rank, move = pending.rank, pending.move
                self._note(rank, "move", f"{move.axis}: {' '.join(move.payload)}", pending.start_s)
                if self._cluster.transport != "gloo":
                    self._next_of(rank, move.channel)
                if rank.waits_since is not None:
                    self._when_served(partial(self._advance, rank))

    def _route(self, source: int, target: int) -> tuple[Uses, tuple[int, ...]]:
        """Links that a message uses, one of each kind, and how many of its kind share them."""
        if (source, target) not in self._routes:
            alike, uses, links = self._symmetry, [], []
            for link in self._network.route(source, target):
                first = alike.unit(link.first, link.ranks)
                same = Resource(link.kind, first, link.ranks, link.direction, link.gbyte_s)
                number = self._links.setdefault(same, len(self._links))
                self._fluid.capacity[number] = link.gbyte_s * 1e9
                end = target if link.direction == "in" else source
                uses.append((number, float(alike.count(end, link.first, link.ranks))))
                links.append(number)
            self._routes[source, target] = tuple(uses), tuple(links)
        return self._routes[source, target]

    def _on_cores(self, rank: int, each: float) -> Uses:
        """Use of the processors by all ranks of a class."""
        return ((CORES, each * self._symmetry.count(rank, 0, self._symmetry.grid.cp_size)),)

    def _note(self, rank: _Rank, what: str, name: str, start: float) -> None:
        if self._keep_spans and self._now > start:
            self._spans.append(Span(rank.number, what, name, start, self._now))
