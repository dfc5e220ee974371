"""How fast a rank's kernels and copies are, while all ranks of its machine run theirs."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

from megatron_wallfacer.engine.merge import merge_into
from megatron_wallfacer.kernels import Kernel
from megatron_wallfacer.kernels.protocol import AttnSpec, accumulation_dtype
from megatron_wallfacer.planning.cluster import Device
from megatron_wallfacer.planning.costs import BACKWARD_FLOPS, FORWARD_FLOPS, MERGED
from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.volume import Shape

#: Tiles are a quarter and the whole of a rank's rows.
PARTS, REPEATS = (4, 1), 5


def measure_device(kernel: Kernel, shape: Shape, dtype: torch.dtype, device: torch.device) -> Device:
    """Rate of forward and backward, time of a call, and rate of merging. Collective."""
    small, large = (_times(kernel, _tensors(shape.tokens // part, shape, dtype, device)) for part in PARTS)
    pairs = [(shape.tokens // part) ** 2 * shape.q_heads * shape.head_dim for part in PARTS]
    rates, calls = [], []
    for flops, *seconds in ((FORWARD_FLOPS, small[0], large[0]), (BACKWARD_FLOPS, small[1], large[1])):
        rate, call = _line(*((flops * count, took) for count, took in zip(pairs, seconds, strict=True)))
        rates.append(rate)
        calls.append(call)
    peak = max(rates)
    return Device(
        peak / 1e12,
        memory_gbyte_s=_merging(shape, dtype, device),
        forward=rates[0] / peak,
        backward=rates[1] / peak,
        call_us=1e6 * min(calls),
    )


def _times(kernel: Kernel, tensors: list[torch.Tensor]) -> tuple[float, float]:
    """Seconds of a full tile: (forward, backward)."""
    q, k, v, dout = tensors
    full = AttnTile((0, len(q)), (0, len(k))), AttnSpec(q.shape[-1] ** -0.5)
    out, lse = kernel.forward(q, k, v, *full)
    forward = _seconds(lambda: kernel.forward(q, k, v, *full), q.device)
    return forward, _seconds(lambda: kernel.backward(dout, q, k, v, out, lse, *full), q.device)


def _merging(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """1e9 bytes a second that merging a rank's output moves through memory."""
    wide = accumulation_dtype(dtype)
    out, part = (
        torch.zeros(shape.tokens, 1, shape.q_heads, shape.head_dim, dtype=wide, device=device) for _ in range(2)
    )
    lse, part_lse = (torch.zeros(shape.tokens, 1, shape.q_heads, dtype=wide, device=device) for _ in range(2))
    seconds = _seconds(lambda: merge_into(out, lse, part, part_lse), device)
    return MERGED * (out.nbytes + lse.nbytes) / seconds / 1e9


def _tensors(rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    heads = (shape.q_heads, shape.kv_heads, shape.kv_heads, shape.q_heads)
    return [torch.randn(rows, 1, count, shape.head_dim, dtype=dtype, device=device) for count in heads]


def _line(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """(operations a second, seconds of a call) of the line through two points; of the large one alone if it falls."""
    rate = (large[0] - small[0]) / max(large[1] - small[1], 1e-12)
    call = large[1] - large[0] / rate
    return (rate, call) if call >= 0 else (large[0] / large[1], 0.0)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of a few calls, of the slowest rank."""
    times = []
    for _ in range(1 + REPEATS):
        dist.barrier()
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    slowest = torch.tensor(median(times[1:]), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()
