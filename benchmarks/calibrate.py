"""Microbenchmarks on the ranks of an emulated cluster: what merging, messages, operations and sleeps cost there.

No scheme is run. What needs no messages runs on all ranks at once, for that is how schemes run: a processor that
turns from one rank to the next finds nothing in its caches. Each number is a median, of rounds and of ranks, but for
lateness on busy processors.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from socket import gethostname
from statistics import mean, median

import torch
import torch.distributed as dist

from benchmarks.cluster.quiet import cpu_time
from benchmarks.cluster.ranks import Ranks
from benchmarks.cluster.topology import Topology
from benchmarks.compute import BACKWARD, FORWARD, SleepKernel
from benchmarks.jobs import RankState
from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.engine.merge import merge_into
from megatron_wallfacer.engine.timeline import Pass
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.planning.cluster import MessageCost
from megatron_wallfacer.planning.costs import MERGED
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.ops import Attend, View, WriteResult
from megatron_wallfacer.schedule.plan import Plan

#: A block of 512 rows, 8 heads and 64 channels in fp32: what the settings of the repository merge at once.
_ROWS, _HEADS, _CHANNELS = 512, 8, 64
#: Buffers that are merged in turn: together larger than a core's cache, as those of all ranks are.
_BUFFERS = 16
#: Bytes of the messages that are tried, from a share of a head's queries to a hop of keys and values.
_SIZES = (1 << 17, 1 << 19, 1 << 21)
#: Seconds that they are exchanged for, by the rate of the slowest link.
_EXCHANGE_S, _FAST_MBIT = 0.4, 8000.0
_LEAST_MESSAGES = 4
#: Of each microbenchmark.
ROUNDS = 3
_IDLE_S = 1.0
_PINGS = 50
#: As long as short kernels of the settings: what wakes often is served sooner.
_NAP_S, _SHORT_NAP_S = 0.01, 1e-3


@dataclass(frozen=True)
class Processors:
    """What Cluster.host and a few latencies need.

    Attributes:
        cores: of the machine, less what idle ranks use of them, and what the host of a virtual machine takes away.
        copy_gbyte_s: bytes that one core moves through memory while it merges.
        messages: processor time of messages of some sizes: in the threads that post them and their receives, and of
            gloo's threads and the kernel's, interrupts included.
        pass_us: of a forward or a backward, its operations apart. These three are of a single rank and a few tokens.
        attend_us: of an operation that calls the kernel.
        operation_us: of one that does something else with tensors.
        late_us: by which a sleep ends later, where processors are fully used, than where nothing else happens; from the
            mean, for some are far later.
        idle_late_us: by which it ends too late where nothing else happens.
        latency_us: until a short message of gloo has been there and back, half of it.
    """

    cores: float
    copy_gbyte_s: float
    messages: tuple[MessageCost, ...]
    pass_us: float
    attend_us: float
    operation_us: float
    late_us: float
    idle_late_us: float
    latency_us: float


def middle(found: Sequence[Processors]) -> Processors:
    """The median of each number."""
    numbers = {one.name for one in fields(Processors)} - {"messages"}
    messages = zip(*(one.messages for one in found), strict=True)
    return Processors(
        messages=tuple(MessageCost(*map(median, zip(*map(astuple, same), strict=True))) for same in messages),
        **{name: median(getattr(one, name) for one in found) for name in numbers},
    )


def measure_processors(ranks: Ranks, topology: Topology, rounds: int = ROUNDS) -> Processors:
    """Run all microbenchmarks; some seconds. The groups of all schemes should be there: their threads never rest.

    Args:
        ranks: of the cluster.
        topology: of the cluster.
        rounds: of those with messages.
    """
    merging, late, *own = (median(found) for found in zip(*ranks.run(on_every_rank), strict=True))
    polling = sum(ranks.run(nap, _IDLE_S)) / _IDLE_S
    pass_us, attend_us, operation_us = (1e6 * one for one in own)
    busy_late, left = _busy(ranks, topology, rounds)
    return Processors(
        cores=((os.cpu_count() or 1) - polling) * left,
        copy_gbyte_s=merging,
        messages=tuple(_message(ranks, topology, size, polling, rounds) for size in _SIZES),
        pass_us=pass_us,
        attend_us=attend_us,
        operation_us=operation_us,
        late_us=1e6 * max(busy_late - late, 0.0),
        idle_late_us=1e6 * late,
        latency_us=1e6 * ranks.run(ping_pong, topology.ranks - 1)[0],
    )


def _message(ranks: Ranks, topology: Topology, size: int, polling: float, rounds: int) -> MessageCost:
    """When all ranks send to the next."""
    slowest_mbit = min((mbit for mbit in (topology.intra_mbit, topology.inter_mbit) if mbit), default=_FAST_MBIT)
    messages = max(_LEAST_MESSAGES, round(_EXCHANGE_S * slowest_mbit * 1e6 / 8 / size))
    threads, rest = [], []
    for _ in range(rounds):
        before = cpu_time()
        all_s, posting_s = map(sum, zip(*ranks.run(exchange, size, messages, polling / topology.ranks), strict=True))
        # Packets are handled in interrupts, which are charged to no process.
        all_s += (cpu_time() - before).interrupts
        threads.append(posting_s / (topology.ranks * messages))
        rest.append((all_s - posting_s) / (topology.ranks * messages))
    return MessageCost(size, 1e6 * median(threads), 1e6 * max(median(rest), 0.0))


def _busy(ranks: Ranks, topology: Topology, rounds: int) -> tuple[float, float]:
    """While all ranks send: mean lateness over the part of the processors in use, and the part not stolen of that."""
    mbit = (topology.intra_mbit if topology.ranks_per_node > 1 else topology.inter_mbit) or _FAST_MBIT
    messages = 1 + round(_EXCHANGE_S * mbit * 1e6 / 8 / _SIZES[-1])
    late, used, left = zip(
        *(one for _ in range(rounds) for one in ranks.run(late_while_sending, messages)), strict=True
    )
    return mean(late) / mean(used), mean(left)


# --- jobs of ranks ---


def on_every_rank(state: RankState) -> tuple[float, ...]:
    """(1e9 bytes merged a second; seconds by which a sleep is late, of a pass, of a kernel's operation, of another)."""
    dist.barrier()
    merging, operations = _merging(), _operations()
    dist.barrier()
    return merging, median(_lateness(_EXCHANGE_S / 2)), *operations


def nap(state: RankState, seconds: float) -> float:
    """Processor seconds of this rank while it does nothing."""
    begin = time.process_time()
    time.sleep(seconds)
    return time.process_time() - begin


def exchange(state: RankState, size: int, rounds: int, idle: float) -> tuple[float, float]:
    """Send to the next rank and receive from the one before, into new buffers, as the engine does.

    Returns:
        Processor seconds of this rank, less the share that it takes when it is idle; those of posting.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    payload, posting = torch.zeros(size, dtype=torch.uint8), 0.0
    dist.barrier()
    begin, started = time.process_time(), time.monotonic()
    for _ in range(rounds):
        posting -= time.thread_time()
        coming = dist.irecv(torch.empty_like(payload), (rank - 1) % ranks)
        leaving = dist.isend(payload, (rank + 1) % ranks)
        posting += time.thread_time()
        leaving.wait()
        coming.wait()
    return time.process_time() - begin - idle * (time.monotonic() - started), posting


def late_while_sending(state: RankState, messages: int) -> tuple[float, float, float]:
    """While neighbours exchange messages.

    Returns:
        Seconds by which sleeps end too late; the part of the machine's processors that is in use; the part of what is
        wanted of them that no other virtual machine takes.
    """
    neighbour, works = dist.get_rank() ^ 1, []
    dist.barrier()
    if neighbour < dist.get_world_size():
        leaving, *coming = (torch.zeros(_SIZES[-1], dtype=torch.uint8) for _ in range(1 + messages))
        works += [dist.irecv(one, neighbour) for one in coming]
        works += [dist.isend(leaving, neighbour) for _ in coming]
    before, began = cpu_time(), time.monotonic()
    late = mean(_lateness(_EXCHANGE_S / 2))
    passed, seconds = cpu_time() - before, time.monotonic() - began
    for work in works:
        work.wait()
    used = max(passed.processes + passed.interrupts, 1e-6)
    return late, used / seconds / (os.cpu_count() or 1), used / (used + passed.stolen)


def ping_pong(state: RankState, target: int) -> float:
    """Seconds of a short message of gloo, one way, between rank 0 and another."""
    rank, message, rounds = dist.get_rank(), torch.zeros(1), []
    dist.barrier()
    if rank not in (0, target):
        return 0.0
    for _ in range(_PINGS):
        begin = time.monotonic()
        for sender, receiver in ((0, target), (target, 0)):
            dist.send(message, receiver) if rank == sender else dist.recv(message, sender)
        rounds.append((time.monotonic() - begin) / 2)
    return median(rounds)


def _rounds(work: Callable[[], object], repeats: int) -> float:
    """Processor seconds of one call, in the thread that works: gloo's threads are counted apart."""
    rounds = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        for _ in range(repeats):
            work()
        rounds.append((time.thread_time() - begin) / repeats)
    return median(rounds)


def _merging() -> float:
    blocks = [(torch.zeros(_ROWS, 1, _HEADS, _CHANNELS), torch.zeros(_ROWS, 1, _HEADS)) for _ in range(2 * _BUFFERS)]

    def merge() -> None:
        for into, part in zip(blocks[:_BUFFERS], blocks[_BUFFERS:], strict=True):
            merge_into(*into, *part)

    touched = MERGED * _BUFFERS * sum(x.nbytes for x in blocks[0])
    return touched / _rounds(merge, 2) / 1e9


def _operations() -> tuple[float, float, float]:
    """Processor seconds of a pass, of an operation that calls the kernel, and of one that copies a few bytes.

    Kernels sleep, so that other ranks come in between.
    """
    q, k, v = (torch.zeros(4, 1, 1, 8, requires_grad=True) for _ in range(3))
    plan, kernel = Plan(Grid()), SleepKernel((FORWARD + BACKWARD) * q.numel() * k.shape[0] / 4 / _SHORT_NAP_S / 1e9)
    alone = AxisGroups(plan.grid, 0, (dist.get_rank(),), (gethostname(),), {})
    found: dict[type, list[float]] = defaultdict(list)

    @contextmanager
    def timed(what: object) -> Iterator[None]:
        begin = time.thread_time()
        yield
        found[type(what)].append(time.thread_time() - begin)

    call = Call(plan, Runtime(Transfers(alone), kernel, 1.0, timed))
    both = _rounds(lambda: attend(q, k, v, call).sum().backward(), 10)
    operations = sum(map(sum, (found[kind] for kind in (View, Attend, WriteResult)))) / (len(found[Pass]) / 2)
    return (both - operations) / 2, median(found[Attend]), median(found[WriteResult])


def _lateness(seconds: float) -> list[float]:
    """By which naps ended too late, for so long."""
    late, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        end = time.monotonic() + _NAP_S
        time.sleep(_NAP_S)
        late.append(time.monotonic() - end)
    return late
