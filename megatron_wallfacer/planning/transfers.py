"""Simulated transfers, whose messages flow over their links as soon as both ends of a message are posted."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial

from megatron_wallfacer.planning.clock import Clock
from megatron_wallfacer.planning.costs import CostModel, TimedOp
from megatron_wallfacer.planning.fluid import Uses
from megatron_wallfacer.planning.processors import processor_use
from megatron_wallfacer.planning.routing import Routing, SharedLink
from megatron_wallfacer.planning.symmetry import Symmetry
from megatron_wallfacer.schedule.ops import Transfer
from megatron_wallfacer.schedule.volume import rows_bytes

Channel = tuple[str, str]


@dataclass(eq=False, slots=True)
class PendingTransfer:
    """A transfer that one rank has begun, with ``left`` messages that have not arrived yet.

    ``start_s`` is the time in seconds at which the rank posted or queued the first messages.
    """

    rank: RankState
    transfer: Transfer
    left: int
    start_s: float


@dataclass(eq=False, slots=True)
class RankState:
    """The state of a simulated rank.

    Attributes:
        number: index of the rank.
        program_rank: rank for which the program was built. Ranks with equal programs share one program.
        program: operations in order.
        position: index of the current operation.
        pass_start_s: time at which the current pass began, in seconds.
        busy: whether the rank works on an operation, on the device or on the host.
        has_run: whether the work of the current operation is done.
        waiting_since_s: time since which the rank waits for a transfer; None if it does not wait.
        incoming: pending transfer that receives each value, by name of the value.
        open_transfers: transfers of the current pass.
        kernel_s: seconds of attention kernels so far.
    """

    number: int
    program_rank: int
    program: list[TimedOp]
    position: int = 0
    pass_start_s: float = 0.0
    busy: bool = False
    has_run: bool = False
    waiting_since_s: float | None = None
    incoming: dict[str, PendingTransfer] = field(default_factory=dict)
    open_transfers: list[PendingTransfer] = field(default_factory=list)
    kernel_s: float = 0.0

    def waits_for(self, op: TimedOp) -> bool:
        """Return whether an operation waits for a tensor that it reads. The end of a pass waits for all transfers."""
        if op.op is None:
            return any(pending.left for pending in self.open_transfers)
        return any(name in self.incoming and self.incoming[name].left for name in op.reads)


class Transfers:
    """All transfers of a simulation. ``on_end`` is called for each transfer whose messages have all arrived."""

    def __init__(
        self, costs: CostModel, symmetry: Symmetry, clock: Clock, on_end: Callable[[PendingTransfer], None]
    ) -> None:
        self._cluster, self._shape, self._symmetry = costs.cluster, costs.shape, symmetry
        self._clock, self._on_end = clock, on_end
        self._routing = Routing(costs.cluster)
        self._posted: dict[Hashable, dict[str, PendingTransfer]] = {}
        self._queues: dict[tuple[int, Channel], deque[Callable[[], PendingTransfer]]] = defaultdict(deque)
        self._running: dict[tuple[int, Channel], PendingTransfer] = {}
        # Links are resources by number, because the hash of a SharedLink is slow.
        self._links: dict[SharedLink, int] = {}
        self._link_bytes: Counter[int] = Counter()
        self._routes: dict[tuple[int, int], tuple[Uses, tuple[int, ...]]] = {}

    @property
    def link_bytes(self) -> Counter[SharedLink]:
        """Return the bytes that the simulated ranks have moved over each link."""
        return Counter({link: self._link_bytes[number] for link, number in self._links.items()})

    def begin(self, rank: RankState, op: TimedOp, transfer: Transfer, ends: Iterable[str]) -> None:
        """Post the given ends of a transfer, ``receive`` and ``send``.

        With NCCL the transfer waits until earlier transfers of its process group have ended.
        """
        pending = next((pending for pending in rank.open_transfers if pending.transfer is transfer), None)
        if pending is None:
            pending = PendingTransfer(rank, transfer, len(transfer.sends) + len(transfer.receives), self._clock.now)
            rank.open_transfers.append(pending)
        else:
            # The receives were posted early.
            ends = ("send",)
        rank.incoming |= {message.value: pending for message in transfer.receives}
        if self._cluster.transport == "gloo":
            self._post(op, pending, ends)
            return
        self._queues[rank.number, transfer.channel].append(partial(self._post, op, pending, ends))
        self._start_next(rank.number, transfer.channel)

    def _start_next(self, rank: int, channel: Channel) -> None:
        """Post the next queued transfers. Each axis has one queue and process group for inputs, and one for results."""
        running = self._running.get((rank, channel))
        if running is not None and running.left:
            return
        queue = self._queues[rank, channel]
        while queue:
            self._running[rank, channel] = queue.popleft()()
            if self._running[rank, channel].left:
                return

    def _post(self, op: TimedOp, pending: PendingTransfer, ends: Iterable[str]) -> PendingTransfer:
        """Post sends or receives of a transfer. A message starts one latency after both of its ends are posted."""
        rank, transfer, symmetry = pending.rank, pending.transfer, self._symmetry
        for end in ends:
            for message in transfer.sends if end == "send" else transfer.receives:
                peer = symmetry.translated(message.peer, rank.program_rank, rank.number)
                source, target = (rank.number, peer) if end == "send" else (peer, rank.number)
                key = (op.pass_number, symmetry.class_of(source), symmetry.offset(source, target), message.tag)
                both = self._posted.setdefault(key, {})
                both[end] = pending
                if len(both) == 2:
                    del self._posted[key]
                    size = rows_bytes(op.schedule, self._shape, transfer.payload, len(message.chunks))
                    latency_s = self._routing.latency_s(source, target)
                    self._clock.after(latency_s, partial(self._flow, source, target, size, both))
        return pending

    def _flow(self, source: int, target: int, size: float, both: dict[str, PendingTransfer]) -> None:
        host = self._cluster.host
        uses, links = self._route(source, target)
        for link in links:
            self._link_bytes[link] += size
        if host is not None and size:
            per_byte_s = host.message(size).transport_us * 1e-6 / size
            uses += processor_use(self._symmetry, target, per_byte_s)
        on_end = partial(self._clock.after_wake_up, partial(self._arrive, both))
        if uses:
            self._clock.fluid.add(size, uses, on_end)
        else:
            on_end()

    def _arrive(self, both: dict[str, PendingTransfer]) -> None:
        for pending in both.values():
            pending.left -= 1
        # If a rank represents its own peer, both ends belong to one transfer.
        for pending in {id(pending): pending for pending in both.values()}.values():
            if not pending.left:
                if self._cluster.transport != "gloo":
                    self._start_next(pending.rank.number, pending.transfer.channel)
                self._on_end(pending)

    def _route(self, source: int, target: int) -> tuple[Uses, tuple[int, ...]]:
        """Return (index, number of messages) of each link on a message's route, and the indices alone."""
        # One simulated message may represent messages of several ranks, some of which use the same link.
        if (source, target) not in self._routes:
            symmetry, uses, numbers = self._symmetry, [], []
            for link in self._routing.route(source, target):
                first = symmetry.unit(link.first, link.ranks)
                representative = SharedLink(link.kind, first, link.ranks, link.direction, link.gbyte_s)
                number = self._links.setdefault(representative, len(self._links))
                self._clock.fluid.capacity[number] = link.gbyte_s * 1e9
                end = target if link.direction == "in" else source
                uses.append((number, float(symmetry.count(end, link.first, link.ranks))))
                numbers.append(number)
            self._routes[source, target] = tuple(uses), tuple(numbers)
        return self._routes[source, target]
