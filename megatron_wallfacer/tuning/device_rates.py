"""Measure the rates of attention kernels and of merging partial results, while all ranks of the node compute."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch

from megatron_wallfacer.engine.merge import merge_into
from megatron_wallfacer.kernels import Kernel
from megatron_wallfacer.kernels.protocol import AttnSpec, accumulation_dtype
from megatron_wallfacer.planning.cluster import Device
from megatron_wallfacer.planning.costs import BACKWARD_FLOPS, FORWARD_FLOPS, MERGED
from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.volume import Shape
from megatron_wallfacer.tuning.timing import time_calls

#: Divisors of a rank's rows that give the rows of the two measured tiles, and number of timed calls.
DIVISORS, REPEATS = (4, 1), 5


def measure_device(kernel: Kernel, shape: Shape, dtype: torch.dtype, device: torch.device) -> Device:
    """Measure a kernel's forward and backward rates, the fixed time per call, and the rate of merging partial results.

    All ranks must call this function with the shape of one rank's shard.
    """
    small, large = (_tile_times(kernel, shape.tokens // part, shape, dtype, device) for part in DIVISORS)
    products = [(shape.tokens // part) ** 2 * shape.q_heads * shape.head_dim for part in DIVISORS]
    rates, calls = [], []
    for flops, *seconds in ((FORWARD_FLOPS, small[0], large[0]), (BACKWARD_FLOPS, small[1], large[1])):
        rate, call = _rate_and_call(*((flops * count, took) for count, took in zip(products, seconds, strict=True)))
        rates.append(rate)
        calls.append(call)
    peak = max(rates)
    return Device(
        peak / 1e12,
        memory_gbyte_s=_merge_gbyte_s(shape, dtype, device),
        forward=rates[0] / peak,
        backward=rates[1] / peak,
        call_us=1e6 * min(calls),
    )


def _tile_times(
    kernel: Kernel, rows: int, shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Return the times of forward and backward, in seconds, on a full tile of ``rows`` queries and ``rows`` keys."""
    heads = (shape.q_heads, shape.kv_heads, shape.kv_heads, shape.q_heads)
    q, k, v, dout = (torch.randn(rows, 1, count, shape.head_dim, dtype=dtype, device=device) for count in heads)
    call = AttnTile((0, rows), (0, rows)), AttnSpec(shape.head_dim**-0.5)
    out, lse = kernel.forward(q, k, v, *call)
    forward_s = _seconds(lambda: kernel.forward(q, k, v, *call), device)
    return forward_s, _seconds(lambda: kernel.backward(dout, q, k, v, out, lse, *call), device)


def _merge_gbyte_s(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Return the rate of a merge of two partial outputs, in 1e9 bytes read or written per second."""
    wide = accumulation_dtype(dtype)
    size = (shape.tokens, 1, shape.q_heads)
    out, partial_out = (torch.zeros(*size, shape.head_dim, dtype=wide, device=device) for _ in range(2))
    lse, partial_lse = (torch.zeros(*size, dtype=wide, device=device) for _ in range(2))
    seconds = _seconds(lambda: merge_into(out, lse, partial_out, partial_lse), device)
    return MERGED * (out.nbytes + lse.nbytes) / seconds / 1e9


def _rate_and_call(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """Fit a fixed time per call and a rate to the (operations, seconds) of a small and a large tile.

    Returns:
        The rate in operations per second, and the fixed time per call in seconds, which is at least 0.
    """
    rate = (large[0] - small[0]) / max(large[1] - small[1], 1e-12)
    call = large[1] - large[0] / rate
    return (rate, call) if call >= 0 else (large[0] / large[1], 0.0)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    return median(time_calls(work, device, REPEATS))
