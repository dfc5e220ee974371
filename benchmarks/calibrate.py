"""Microbenchmarks on the ranks of an emulated cluster: what merging, messages, operations and sleeps cost there.

No scheme is run. What needs no messages runs on all ranks at once, for that is how schemes run: a processor that
turns from one rank to the next finds nothing in its caches. Each number is a median, of rounds and of ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from socket import gethostname
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.cluster.quiet import cpu_time
from benchmarks.cluster.ranks import Ranks
from benchmarks.cluster.topology import Topology
from benchmarks.compute import BACKWARD, FORWARD, SleepKernel
from benchmarks.jobs import RankState
from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call
from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.engine.merge import merge_into
from megatron_wallfacer.engine.run import Runtime
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.planning.costs import MERGED
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule

#: A block of 512 rows, 8 heads and 64 channels in fp32: what the settings of the repository merge at once.
_ROWS, _HEADS, _CHANNELS = 512, 8, 64
#: Buffers that are merged in turn: together larger than a core's cache, as those of all ranks are.
_BUFFERS = 16
#: Bytes of a short and a long message: what both cost is of the message, what the long one costs more is of its bytes.
_SHORT, _LONG = 1 << 18, 1 << 22
#: Seconds that they are exchanged for, by the rate of the slowest link.
_EXCHANGE_S, _FAST_MBIT = 0.4, 8000.0
_LEAST_MESSAGES = 4
_ROUNDS = 3
_IDLE_S = 1.0
_PINGS = 50
_NAP_S = 1e-3


@dataclass(frozen=True)
class Processors:
    """What Cluster.host and a few latencies need.

    Attributes:
        cores: of the machine, less what idle ranks use of them.
        copy_gbyte_s: bytes that one core moves through memory while it merges.
        operation_us: of an operation of a schedule: that of a single rank, run by the engine on a few tokens.
        late_us: by which a sleep ends too late.
        latency_us: until a short message of gloo has been there and back, half of it.
        transport_us: processor time of one end of a message, interrupts included, whatever its size.
        transport_s_per_gbyte: and of its bytes.
    """

    cores: float
    copy_gbyte_s: float
    operation_us: float
    late_us: float
    latency_us: float
    transport_us: float
    transport_s_per_gbyte: float


def measure_processors(ranks: Ranks, topology: Topology) -> Processors:
    """Run all microbenchmarks; some seconds. The groups of all schemes should be there: their threads never rest."""
    merging, operation, late = (median(found) for found in zip(*ranks.run(on_every_rank), strict=True))
    polling = sum(ranks.run(nap, _IDLE_S)) / _IDLE_S
    short, long = (_end_s(ranks, topology, size, polling) for size in (_SHORT, _LONG))
    per_byte = max(long - short, 0.0) / (_LONG - _SHORT)
    return Processors(
        cores=(os.cpu_count() or 1) - polling,
        copy_gbyte_s=merging,
        operation_us=1e6 * operation,
        late_us=1e6 * late,
        latency_us=1e6 * ranks.run(ping_pong, topology.ranks - 1)[0],
        transport_us=1e6 * max(short - per_byte * _SHORT, 0.0),
        transport_s_per_gbyte=1e9 * per_byte,
    )


def _end_s(ranks: Ranks, topology: Topology, size: int, polling: float) -> float:
    """Processor seconds of one end of a message, when all ranks send to the next."""
    slowest_mbit = min((mbit for mbit in (topology.intra_mbit, topology.inter_mbit) if mbit), default=_FAST_MBIT)
    rounds = max(_LEAST_MESSAGES, round(_EXCHANGE_S * slowest_mbit * 1e6 / 8 / size))
    found = []
    for _ in range(_ROUNDS):
        before = cpu_time()
        threads = sum(ranks.run(exchange, size, rounds, polling / topology.ranks))
        # Packets are handled in interrupts, which are charged to no process.
        found.append((threads + (cpu_time() - before).interrupts) / (2 * topology.ranks * rounds))
    return median(found)


# --- jobs of ranks ---


def on_every_rank(state: RankState) -> tuple[float, float, float]:
    """(1e9 bytes merged a second, seconds of an operation, seconds that a sleep is late)."""
    dist.barrier()
    return _merging(), _operation(), _lateness()


def nap(state: RankState, seconds: float) -> float:
    """Processor seconds of this rank while it does nothing."""
    begin = time.process_time()
    time.sleep(seconds)
    return time.process_time() - begin


def exchange(state: RankState, size: int, rounds: int, idle: float) -> float:
    """Send to the next rank and receive from the one before, into new buffers, as the engine does.

    Returns:
        Processor seconds of this rank, less the share that it takes when it is idle.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    payload = torch.zeros(size, dtype=torch.uint8)
    dist.barrier()
    begin, started = time.process_time(), time.monotonic()
    for _ in range(rounds):
        coming = dist.irecv(torch.empty_like(payload), (rank - 1) % ranks)
        dist.isend(payload, (rank + 1) % ranks).wait()
        coming.wait()
    return time.process_time() - begin - idle * (time.monotonic() - started)


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
    for _ in range(_ROUNDS):
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


def _operation() -> float:
    """Seconds of an operation where nothing is moved. Kernels sleep, so that other ranks come in between."""
    q, k, v = (torch.zeros(4, 1, 1, 8, requires_grad=True) for _ in range(3))
    plan, kernel = Plan(Grid()), SleepKernel((FORWARD + BACKWARD) * q.numel() * k.shape[0] / 4 / _NAP_S / 1e9)
    alone = AxisGroups(plan.grid, 0, (dist.get_rank(),), (gethostname(),), {})
    call = Call(plan, Runtime(Transfers(alone), kernel, 1.0))
    operations = len(forward_schedule(plan, 0).ops) + len(backward_schedule(plan, 0).ops)
    return _rounds(lambda: attend(q, k, v, call).sum().backward(), 10) / operations


def _lateness() -> float:
    late = []
    for _ in range(50):
        end = time.monotonic() + 2 * _NAP_S
        time.sleep(2 * _NAP_S)
        late.append(time.monotonic() - end)
    return median(late)
