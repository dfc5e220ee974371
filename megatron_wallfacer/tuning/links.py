"""Measure links within a node, between two nodes, and between GPUs and host memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from megatron_wallfacer.tuning.timing import time_calls

#: Bytes of a long message, of a short message and of a copy to or from host memory; number of timed repetitions.
LARGE, SHORT, HOST_COPY, REPEATS = 32 << 20, 1024, 256 << 20, 5


def measure_link(pairs: Sequence[tuple[int, int]], device: torch.device) -> tuple[float, float]:
    """Measure a link that pairs of ranks use in both directions at the same time. All ranks must call this function.

    Returns:
        Rate per direction in 1e9 bytes per second, and time of a short message in microseconds.
    """
    latency_s = _exchange_s(pairs, SHORT, device)
    large_s = _exchange_s(pairs, LARGE, device)
    return LARGE / max(large_s - latency_s, 1e-9) / 1e9, 1e6 * latency_s


def measure_nics(nodes: int, ranks_per_node: int, device: torch.device) -> tuple[float, float, int]:
    """Measure the NICs of a node: first one pair of ranks on two nodes exchanges messages, then all pairs do.

    All ranks must call this function.

    Returns:
        Rate of one NIC in 1e9 bytes per second, time of a short message in microseconds, and number of NICs per node.
    """
    if nodes == 1:
        return float("inf"), 0.0, ranks_per_node
    alone, latency_us = measure_link([(0, ranks_per_node)], device)
    shared, _ = measure_link([(rank, ranks_per_node + rank) for rank in range(ranks_per_node)], device)
    ratio = ranks_per_node * shared / alone
    divisors = (size for size in range(1, ranks_per_node + 1) if ranks_per_node % size == 0)
    nics = min(divisors, key=lambda size: abs(size - ratio))
    return shared * ranks_per_node / nics, latency_us, nics


def measure_host_memory(device: torch.device) -> tuple[float | None, float | None]:
    """Measure the link between a GPU and host memory while all ranks copy. All ranks must call this function.

    Returns:
        Rate of the slower copy direction in 1e9 bytes per second, and host memory per node in 1e9 bytes. Both are None
        on CPUs.
    """
    if device.type != "cuda":
        return None, None
    on_gpu = torch.empty(HOST_COPY, dtype=torch.uint8, device=device)
    on_host = torch.empty(HOST_COPY, dtype=torch.uint8, pin_memory=True)
    seconds = [
        min(time_calls(partial(target.copy_, source, non_blocking=True), device, REPEATS))
        for target, source in ((on_host, on_gpu), (on_gpu, on_host))
    ]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return HOST_COPY / max(seconds) / 1e9, size / 1e9


def _exchange_s(pairs: Sequence[tuple[int, int]], size: int, device: torch.device) -> float:
    """Return the seconds of the fastest exchange of ``size`` bytes. Ranks outside all pairs send nothing."""
    peers = {rank: peer for pair in pairs for rank, peer in (pair, pair[::-1])}
    peer = peers.get(dist.get_rank())

    def exchange() -> None:
        if peer is None:
            return
        received, sent = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
        messages = [dist.P2POp(dist.irecv, received, peer), dist.P2POp(dist.isend, sent, peer)]
        for work in dist.batch_isend_irecv(messages):
            work.wait()

    return min(time_calls(exchange, device, REPEATS))
