"""A discrete-event simulation of schedules on a modelled cluster, in which messages share links.

Each rank runs its operations one after the other, as in the engine. A rank waits for a transfer at the first operation
that reads a value of the transfer. One rank of each class is simulated
(:mod:`megatron_wallfacer.planning.symmetry`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_wallfacer.planning.clock import Clock
from megatron_wallfacer.planning.costs import CostModel, TimedOp, rank_program
from megatron_wallfacer.planning.fluid import Fluid
from megatron_wallfacer.planning.processors import CORES, WakeUpDelay, overhead_s, processor_use
from megatron_wallfacer.planning.routing import SharedLink
from megatron_wallfacer.planning.symmetry import Symmetry
from megatron_wallfacer.planning.transfers import PendingTransfer, RankState, Transfers
from megatron_wallfacer.schedule.ops import PostRecv, Schedule, SendRecv


@dataclass(frozen=True)
class Span:
    """An interval in the timeline of a simulated rank.

    Attributes:
        rank: rank of the timeline.
        kind: ``pass``, ``kernel``, ``copy`` (merging and packing), ``wait`` or ``transfer``.
        name: type of the operation; for a transfer its axis and tensors; for a pass ``forward`` or ``backward``.
        start_s, end_s: seconds since the start of the simulation.
    """

    rank: int
    kind: str
    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class SimulationResult:
    """The result of a simulation.

    Attributes:
        seconds: time until the last rank has ended all passes, in seconds.
        pass_s: time until the last rank has ended each pass, in seconds.
        kernel_s: largest time of attention kernels on any rank, in seconds.
        ranks: number of simulated ranks.
        link_bytes: bytes that the simulated ranks move over each link. One simulated link represents all equivalent
            links.
        spans: timelines of the simulated ranks; empty unless they are recorded.
    """

    seconds: float
    pass_s: tuple[float, ...]
    kernel_s: float
    ranks: int
    link_bytes: Counter[SharedLink]
    spans: tuple[Span, ...]


class DeadlockError(RuntimeError):
    """Error of a simulation in which ranks wait for messages that no rank sends, because the schedules do not match."""


def simulate(
    costs: CostModel,
    schedules: Callable[[int], Sequence[Schedule]],
    symmetry: Symmetry,
    *,
    spans: bool = False,
    seed: int = 0,
) -> SimulationResult:
    """Simulate the passes of an attention layer.

    Args:
        costs: costs of operations, on a cluster with at least as many devices as ranks.
        schedules: function from a rank to the schedules of its passes, in order.
        symmetry: classes of ranks with equal times.
        spans: whether to record timelines.
        seed: seed of the random wake-up delays on an emulated cluster.

    Raises:
        DeadlockError: The schedules of the ranks do not match, or a simulated rank differs from the ranks that it
            represents.
    """
    return _Simulator(costs, schedules, symmetry, spans, seed).run()


class _Simulator:
    def __init__(
        self,
        costs: CostModel,
        schedules: Callable[[int], Sequence[Schedule]],
        symmetry: Symmetry,
        record_spans: bool,
        seed: int,
    ) -> None:
        self._cluster, self._symmetry, host = costs.cluster, symmetry, costs.cluster.host
        wake_up = WakeUpDelay(host, seed) if host and host.wake_up_us else None
        self._clock = Clock(Fluid({CORES: float(host.cores)} if host else {}), wake_up)
        self._transfers = Transfers(costs, symmetry, self._clock, self._end_transfer)
        program_ranks = {rank: symmetry.program_rank(rank) for rank in symmetry.representatives}
        programs = {rank: rank_program(schedules(rank), costs) for rank in sorted(set(program_ranks.values()))}
        self._ranks = {rank: RankState(rank, first, programs[first]) for rank, first in program_ranks.items()}
        self._pass_s: dict[int, float] = {}
        self._record_spans = record_spans
        self._spans: list[Span] = []

    def run(self) -> SimulationResult:
        for rank in self._ranks.values():
            self._advance(rank)
        while self._clock.step():
            pass
        stuck = [rank.number for rank in self._ranks.values() if rank.position < len(rank.program)]
        if stuck:
            raise DeadlockError(f"ranks {stuck} wait for messages that no rank sends")
        return SimulationResult(
            seconds=self._clock.now,
            pass_s=tuple(self._pass_s[number] for number in sorted(self._pass_s)),
            kernel_s=max(rank.kernel_s for rank in self._ranks.values()),
            ranks=len(self._ranks),
            link_bytes=self._transfers.link_bytes,
            spans=tuple(self._spans),
        )

    def _advance(self, rank: RankState) -> None:
        while rank.position < len(rank.program) and not rank.busy:
            op = rank.program[rank.position]
            if self._is_waiting(rank, op):
                return
            if not rank.has_run:
                rank.has_run = True
                self._run_when_issued(rank, op)
                continue
            rank.has_run = False
            rank.position += 1
            self._complete(rank, op)
            self._write_messages(rank, op)

    def _is_waiting(self, rank: RankState, op: TimedOp) -> bool:
        waiting = rank.waits_for(op)
        if waiting and rank.waiting_since_s is None:
            rank.waiting_since_s = self._clock.now
        if not waiting and rank.waiting_since_s is not None:
            self._record(rank, "wait", op.name, rank.waiting_since_s)
            rank.waiting_since_s = None
        return waiting

    def _run_when_issued(self, rank: RankState, op: TimedOp) -> None:
        """Run an operation once the host has issued it. The host may be slower than the device."""
        lag_s = rank.pass_start_s + op.first_issued_s - self._clock.now
        if lag_s <= 0:
            self._run(rank, op)
            return

        def run() -> None:
            rank.busy = False
            self._run(rank, op)
            self._advance(rank)

        rank.busy = True
        self._clock.after(lag_s, run)

    def _run(self, rank: RankState, op: TimedOp) -> None:
        cost, work_s = op.cost, self._work_s(op)
        if not cost.kernel_s and not work_s:
            return
        rank.busy, rank.kernel_s = True, rank.kernel_s + cost.kernel_s
        start_s = self._clock.now

        def end_kernels() -> None:
            self._record(rank, "kernel", op.name, start_s)
            self._work(rank, op.name, work_s)

        if cost.kernel_s:
            # The host may issue the last of several calls only after earlier calls have ended.
            kernel_s = max(cost.kernel_s, rank.pass_start_s + op.issued_s - start_s)
            self._clock.after(kernel_s, lambda: self._clock.after_wake_up(end_kernels, len(op.op.tiles)))
        else:
            end_kernels()

    def _work_s(self, op: TimedOp) -> float:
        """Return the seconds of an operation's merges, copies and launches on an otherwise idle processor or device."""
        host, memory, cost = self._cluster.host, self._cluster.device.memory_gbyte_s, op.cost
        if host is not None:
            return cost.memory_bytes / (host.copy_gbyte_s * 1e9) + overhead_s(host, op.op)
        return cost.launch_s + (0.0 if memory is None else cost.memory_bytes / (memory * 1e9))

    def _write_messages(self, rank: RankState, op: TimedOp) -> None:
        """Keep a rank busy while its main thread writes messages to sockets."""
        host = self._cluster.host
        if host is not None and (work_s := 1e-6 * sum(host.message(size).thread_us for size in op.cost.sends)):
            self._work(rank, op.name, work_s)

    def _work(self, rank: RankState, name: str, work_s: float) -> None:
        """Keep a rank busy with work that takes ``work_s`` seconds on an idle device or CPU core."""
        # On an emulated cluster these are CPU seconds. Shared cores are modelled like shared links, in bytes.
        rank.busy, start_s = True, self._clock.now

        def end_work() -> None:
            self._record(rank, "copy", name, start_s)
            rank.busy = False
            self._advance(rank)

        if not work_s:
            end_work()
        elif self._cluster.host is None:
            self._clock.after(work_s, end_work)
        else:
            largest = self._cluster.host.messages[-1:]
            byte_s = sum(message.transport_us * 1e-6 / message.size for message in largest) or 1.0
            uses = processor_use(self._symmetry, rank.number, byte_s)
            self._clock.fluid.add(work_s / byte_s, uses, end_work, limit=1 / byte_s)

    def _complete(self, rank: RankState, op: TimedOp) -> None:
        match op.op:
            case None:
                rank.incoming.clear()
                rank.open_transfers.clear()
                self._record(rank, "pass", "backward" if op.schedule.backward else "forward", rank.pass_start_s)
                rank.pass_start_s = self._clock.now
                self._pass_s[op.pass_number] = max(self._pass_s.get(op.pass_number, 0.0), self._clock.now)
            case PostRecv(transfer=transfer):
                if self._cluster.transport == "gloo":
                    self._transfers.begin(rank, op, transfer, ends=("receive",))
            case SendRecv(transfer=transfer):
                self._transfers.begin(rank, op, transfer, ends=("receive", "send"))

    def _end_transfer(self, pending: PendingTransfer) -> None:
        rank, transfer = pending.rank, pending.transfer
        self._record(rank, "transfer", f"{transfer.axis}: {' '.join(transfer.payload)}", pending.start_s)
        if rank.waiting_since_s is not None:
            self._clock.after_wake_up(lambda: self._advance(rank))

    def _record(self, rank: RankState, kind: str, name: str, start_s: float) -> None:
        if self._record_spans and self._clock.now > start_s:
            self._spans.append(Span(rank.number, kind, name, start_s, self._clock.now))
