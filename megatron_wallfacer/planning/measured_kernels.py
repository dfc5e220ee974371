"""Time of an attention call, interpolated between measured kernels.

``seconds = flops / rate(flops)``. Between two measured sizes log(rate) is linear in log(FLOPs). Below the smallest and
above the largest size the rate is constant. The measured rates also apply to other shapes and numbers of heads. Such
rates are accurate to 20 % for calls of at least 30 GFLOP. Full and causal tiles have separate curves. The seconds
include the whole device time of a call. In the smallest calls the device also waits for the host. Rates of small calls
are limited to the rate of the largest call. In a measurement of small calls the GPU has a clock rate that it cannot
sustain during a whole pass.
"""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from math import exp, log
from pathlib import Path
from statistics import median

from megatron_wallfacer.schedule.volume import Shape

DATA = Path(__file__).with_name("data")
#: Tables of measured kernels, by the value of ``kernels`` in a cluster file.
TABLES = {"h200": DATA / "attention_h200.csv"}
#: FLOPs per unmasked pair of query and key and per channel of a query head: two products forward, five backward.
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10
#: Channels per head of the measured kernels.
_HEAD_DIM = 128


def call_seconds(
    table: str, pairs: float, heads: int, head_dim: float, *, backward: bool = False, causal: bool = False
) -> float:
    """Return the device seconds of one attention call.

    Args:
        table: key of :data:`TABLES`.
        pairs: unmasked pairs of rows and columns, in all sequences of the batch together.
        heads: number of query heads.
        head_dim: channels per head; the mean of q and v if they differ.
        backward: whether the call computes gradients.
        causal: whether half of the tile's pairs are masked. ``pairs`` does not include masked pairs.
    """
    flops = pairs * heads * head_dim * (BACKWARD_FLOPS if backward else FORWARD_FLOPS)
    return _seconds(table, flops, backward, causal) if flops else 0.0


def best_rate(table: str, *, backward: bool) -> float:
    """Return the FLOPs per second of the fastest measured size."""
    return max(flops / seconds for causal in (False, True) for flops, seconds in _curve(table, backward, causal))


def mean_head_dim(shape: Shape) -> float:
    """Return the mean of the head dims of q and v. The products QK and PV have equal FLOPs per channel."""
    return (shape.head_dim + (shape.v_head_dim or shape.head_dim)) / 2


# Cached, because the tiles of a plan have few sizes.
@lru_cache(maxsize=4096)
def _seconds(table: str, flops: float, backward: bool, causal: bool) -> float:
    curve = _curve(table, backward, causal)
    index = bisect_right(curve, (flops, float("inf")))
    if index in (0, len(curve)):
        nearest = curve[min(index, len(curve) - 1)]
        return flops * nearest[1] / nearest[0]
    (small, fast), (large, slow) = curve[index - 1], curve[index]
    part = log(flops / small) / log(large / small)
    return fast * exp(part * log(slow / fast))


@lru_cache
def _curve(table: str, backward: bool, causal: bool) -> Sequence[tuple[float, float]]:
    """Return (FLOPs, seconds) of measured calls, ascending in both; the median for calls with equal FLOPs."""
    seconds: dict[float, list[float]] = {}
    with TABLES[table].open(encoding="utf-8") as lines:
        for row in csv.DictReader(line for line in lines if not line.startswith("#")):
            if (row["mask"] == "causal") == causal:
                pairs = int(row["rows"]) * int(row["cols"]) * (0.5 if causal else 1.0)
                flops = pairs * int(row["q_heads"]) * _HEAD_DIM * (BACKWARD_FLOPS if backward else FORWARD_FLOPS)
                seconds.setdefault(flops, []).append(1e-6 * float(row["backward_us" if backward else "forward_us"]))
    largest = max(seconds)
    sustained = largest / median(seconds[largest])
    curve: list[tuple[float, float]] = []
    for flops in sorted(seconds):
        # The host limits the smallest calls, so a smaller call may have taken longer.
        least = curve[-1][1] if curve else 0.0
        curve.append((flops, max(least, median(seconds[flops]), flops / sustained)))
    return tuple(curve)
