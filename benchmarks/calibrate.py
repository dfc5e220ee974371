"""Microbenchmarks of this machine's processors: what merging, a transfer and a sleep cost. No scheme is run."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from benchmarks.compute import SleepKernel
from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call
from megatron_wallfacer.engine.groups import connect
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
_REPEATS = 5
_PIECE, _PIECES = 1 << 20, 128


@dataclass(frozen=True)
class Processors:
    """What Cluster.host and a few latencies need.

    Attributes:
        cores: of the machine.
        copy_gbyte_s: bytes that one core moves through memory while it merges.
        transport_s_per_gbyte: processor seconds of one end of a transfer over TCP.
        operation_us: of an operation of a schedule: that of a single rank, run by the engine on a few tokens.
        message_us: until a short message of gloo has been there and back, half of it.
        late_us: by which a sleep ends too late.
    """

    cores: int
    copy_gbyte_s: float
    transport_s_per_gbyte: float
    operation_us: float
    message_us: float
    late_us: float


def measure_processors() -> Processors:
    """Run all microbenchmarks; a few seconds. The best of several, for others use the machine too."""
    torch.set_num_threads(1)
    return Processors(
        cores=os.cpu_count() or 1,
        copy_gbyte_s=_merging(),
        transport_s_per_gbyte=_transport(),
        operation_us=1e6 * _operation(),
        message_us=1e6 * _message(),
        late_us=1e6 * _lateness(),
    )


def _best(work: Callable[[], object], repeats: int) -> float:
    """Processor seconds of one call, the least of a few rounds."""
    rounds = []
    for _ in range(_REPEATS):
        begin = time.process_time()
        for _ in range(repeats):
            work()
        rounds.append((time.process_time() - begin) / repeats)
    return min(rounds)


def _merging() -> float:
    blocks = [(torch.zeros(_ROWS, 1, _HEADS, _CHANNELS), torch.zeros(_ROWS, 1, _HEADS)) for _ in range(2 * _BUFFERS)]

    def merge() -> None:
        for into, part in zip(blocks[:_BUFFERS], blocks[_BUFFERS:], strict=True):
            merge_into(*into, *part)

    touched = MERGED * _BUFFERS * sum(x.nbytes for x in blocks[0])
    return touched / _best(merge, 4) / 1e9


def _operation() -> float:
    """Seconds of an operation where nothing is moved and kernels take no time."""
    plan, kernel = Plan(Grid()), SleepKernel(1e12)
    call = Call(plan, Runtime(Transfers(connect(None, plan.grid)), kernel, 1.0))
    q, k, v = (torch.zeros(4, 1, 1, 8, requires_grad=True) for _ in range(3))
    operations = len(forward_schedule(plan, 0).ops) + len(backward_schedule(plan, 0).ops)
    return _best(lambda: attend(q, k, v, call).sum().backward(), 100) / operations


def _lateness() -> float:
    late = []
    for _ in range(50):
        end = time.monotonic() + 2e-3
        time.sleep(2e-3)
        late.append(time.monotonic() - end)
    return sorted(late)[len(late) // 2]


def _transport() -> float:
    """Processor seconds of an end for 1e9 bytes over TCP on this machine."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    other, _ = server.accept()
    with server, client, other:
        begin = time.process_time()
        reader = threading.Thread(target=_drain, args=(other, _PIECE * _PIECES))
        reader.start()
        for _ in range(_PIECES):
            client.sendall(bytes(_PIECE))
        reader.join()
        return (time.process_time() - begin) / 2 / (_PIECE * _PIECES / 1e9)


def _message() -> float:
    """Seconds of a short message of gloo, one way, between two processes."""
    context = get_context("spawn")
    with TemporaryDirectory() as folder:
        ours, theirs = context.Pipe()
        ranks = [context.Process(target=_ping_pong, args=(rank, f"{folder}/store", theirs)) for rank in (0, 1)]
        for rank in ranks:
            rank.start()
        seconds = ours.recv()
        for rank in ranks:
            rank.join()
    return seconds


def _ping_pong(rank: int, store: str, said: Connection) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    message, rounds = torch.zeros(1), []
    for _ in range(200):
        begin = time.monotonic()
        for sender in (0, 1):
            dist.send(message, 1 - rank) if rank == sender else dist.recv(message, 1 - rank)
        rounds.append((time.monotonic() - begin) / 2)
    if rank == 0:
        said.send(sorted(rounds)[len(rounds) // 2])
    dist.barrier()
    dist.destroy_process_group()


def _drain(connection: socket.socket, size: int) -> None:
    while size:
        size -= len(connection.recv(min(size, _PIECE)))
