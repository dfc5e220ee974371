"""Microbenchmarks of this machine's processors: what merging, a transfer and a sleep cost. No scheme is run."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_wallfacer.engine.merge import merge_into
from megatron_wallfacer.planning.costs import MERGED

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
        operation_us: of an operation of a schedule that does next to nothing: Python, and one small call of torch.
        message_us: until a short message has been there and back, half of it.
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
    transport, message = _transport()
    return Processors(
        cores=os.cpu_count() or 1,
        copy_gbyte_s=_merging(),
        transport_s_per_gbyte=transport,
        operation_us=1e6 * _best(_small_operation, 2000),
        message_us=1e6 * message,
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


def _small_operation() -> None:
    torch.empty(8, 1, 2, 4)


def _lateness() -> float:
    late = []
    for _ in range(50):
        end = time.monotonic() + 2e-3
        time.sleep(2e-3)
        late.append(time.monotonic() - end)
    return sorted(late)[len(late) // 2]


def _transport() -> tuple[float, float]:
    """(processor seconds of an end for 1e9 bytes, seconds of a short message one way) over TCP on this machine."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    other, _ = server.accept()
    for end in (client, other):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with server, client, other:
        begin = time.process_time()
        reader = threading.Thread(target=_drain, args=(other, _PIECE * _PIECES))
        reader.start()
        for _ in range(_PIECES):
            client.sendall(bytes(_PIECE))
        reader.join()
        each_end = (time.process_time() - begin) / 2 / (_PIECE * _PIECES / 1e9)
        rounds = []
        for _ in range(200):
            begin = time.monotonic()
            client.sendall(b"x")
            other.sendall(other.recv(1))
            client.recv(1)
            rounds.append((time.monotonic() - begin) / 2)
    return each_end, sorted(rounds)[len(rounds) // 2]


def _drain(connection: socket.socket, size: int) -> None:
    while size:
        size -= len(connection.recv(min(size, _PIECE)))
