"""How fast the devices of a node copy to and from host memory while all of them do, and how much there is of it."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

#: Bytes of one copy, and copies of each direction.
SIZE, REPEATS = 256 << 20, 5
#: What is printed on ranks without a device.
NO_DEVICE = "host_link: not measured, ranks on CPUs have no link to host memory; keeping on the host is not offered"


def host_memory(device: torch.device) -> tuple[float | None, float | None]:
    """Return (1e9 bytes per second of each device and direction, 1e9 bytes of the node); None, None on CPUs.

    Collective: all ranks copy at once, and the slowest counts.
    """
    if device.type != "cuda":
        return None, None
    there, here = (
        torch.empty(SIZE, dtype=torch.uint8, **where) for where in ({"device": device}, {"pin_memory": True})
    )
    slowest = max(_seconds(here, there), _seconds(there, here))
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return SIZE / slowest / 1e9, size / 1e9


def _seconds(into: torch.Tensor, source: torch.Tensor) -> float:
    """Seconds of one copy on the slowest rank, the best of several."""
    best = float("inf")
    for _ in range(1 + REPEATS):
        dist.barrier()
        begin = time.perf_counter()
        into.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        took = torch.tensor(time.perf_counter() - begin, device=torch.cuda.current_device())
        dist.all_reduce(took, dist.ReduceOp.MAX)
        best = min(best, took.item())
    return best
