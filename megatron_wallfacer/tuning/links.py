"""How fast messages are between ranks, inside a node and between two."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

#: A large message, a short one, and how often each is sent.
LARGE, SHORT, REPEATS = 32 << 20, 1024, 5


def exchange_s(pairs: Sequence[tuple[int, int]], size: int, device: torch.device) -> float:
    """Seconds for messages of so many bytes, both ways between both ranks of all pairs at once; the best of several.

    Collective: ranks in no pair wait.
    """
    partners = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    peer = partners.get(dist.get_rank())
    best = float("inf")
    for _ in range(REPEATS):
        dist.barrier()
        begin = time.perf_counter()
        if peer is not None:
            _exchange(peer, size, device)
        took = torch.tensor(time.perf_counter() - begin if peer is not None else 0.0, device=device)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        best = min(best, took.item())
    return best


def _exchange(peer: int, size: int, device: torch.device) -> None:
    mine, theirs = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    works = dist.batch_isend_irecv([dist.P2POp(dist.irecv, theirs, peer), dist.P2POp(dist.isend, mine, peer)])
    for work in works:
        work.wait()
    if device.type == "cuda":
        torch.cuda.synchronize()


def link(pairs: Sequence[tuple[int, int]], device: torch.device) -> tuple[float, float]:
    """(1e9 bytes a second of each direction, microseconds of a short message) of pairs that talk at once."""
    exchange_s(pairs, SHORT, device)  # makes the connections
    latency_s = exchange_s(pairs, SHORT, device)
    large_s = exchange_s(pairs, LARGE, device)
    return LARGE / max(large_s - latency_s, 1e-9) / 1e9, 1e6 * latency_s


def cards_of_node(nodes: int, each: int, device: torch.device) -> tuple[float, float, int]:
    """(rate of a card, latency, cards of a node), from one pair of ranks between two nodes and from all of them."""
    if nodes == 1:
        return float("inf"), 0.0, each
    alone, latency_us = link([(0, each)], device)
    together, _ = link([(rank, each + rank) for rank in range(each)], device)
    wanted = each * together / alone
    cards = min((d for d in range(1, each + 1) if each % d == 0), key=lambda d: abs(d - wanted))
    return together * each / cards, latency_us, cards
