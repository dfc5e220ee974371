"""Measured attention kernels: the seconds of one call from its size.

``seconds = flops / rate(flops)``. Between two measured sizes log(rate) is linear in log(FLOPs); beyond the smallest and
the largest size the rate is constant. So seconds grow with the FLOPs. From 30 GFLOP on, tiles of other shapes and heads
with as many FLOPs are within 20 % of the rate. Full and causal tiles have a curve each. The seconds include all that a
call costs the device. The smallest sizes are bound by the host. No size has a higher rate than the largest: a card runs
short calls at clocks that it does not sustain over a pass, and in whole passes no tile was faster.
"""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from math import exp, log
from pathlib import Path
from statistics import median

DATA = Path(__file__).with_name("data")
#: Measured kernels, by the name that a cluster file gives as ``kernels``.
TABLES = {"h200": DATA / "attention_h200.csv"}
#: FLOPs of an unmasked pair of query and key for each channel of each query head: two products forward, five backward.
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10
#: Channels of a head in the tables.
_HEAD_DIM = 128

Point = tuple[float, float]


def call_seconds(
    table: str, pairs: float, heads: int, head_dim: float, *, backward: bool = False, causal: bool = False
) -> float:
    """Return the seconds of one attention call on the device.

    Args:
        table: one of :data:`TABLES`.
        pairs: unmasked pairs of rows and columns, all sequences of the batch together.
        heads: query heads.
        head_dim: channels per head; the mean of q's and v's where they differ.
        backward: the call computes gradients.
        causal: half of the tile's pairs are masked, and not counted.
    """
    flops = pairs * heads * head_dim * (BACKWARD_FLOPS if backward else FORWARD_FLOPS)
    return _seconds(table, flops, backward, causal) if flops else 0.0


def best_rate(table: str, *, backward: bool) -> float:
    """Return the FLOPs per second of the fastest measured size."""
    return max(flops / seconds for causal in (False, True) for flops, seconds in _curve(table, backward, causal))


# The tiles of a plan have few sizes.
@lru_cache(maxsize=4096)
def _seconds(table: str, flops: float, backward: bool, causal: bool) -> float:
    curve = _curve(table, backward, causal)
    at = bisect_right(curve, (flops, float("inf")))
    if at in (0, len(curve)):
        nearest = curve[min(at, len(curve) - 1)]
        return flops * nearest[1] / nearest[0]
    (small, fast), (large, slow) = curve[at - 1], curve[at]
    part = log(flops / small) / log(large / small)
    return fast * exp(part * log(slow / fast))


@lru_cache
def _curve(table: str, backward: bool, causal: bool) -> Sequence[Point]:
    """(FLOPs, seconds) by FLOPs, ascending in both; of tiles with as many FLOPs the median."""
    found: dict[float, list[float]] = {}
    with TABLES[table].open(encoding="utf-8") as lines:
        for row in csv.DictReader(line for line in lines if not line.startswith("#")):
            if (row["mask"] == "causal") == causal:
                pairs = int(row["rows"]) * int(row["cols"]) * (0.5 if causal else 1.0)
                flops = pairs * int(row["q_heads"]) * _HEAD_DIM * (BACKWARD_FLOPS if backward else FORWARD_FLOPS)
                found.setdefault(flops, []).append(1e-6 * float(row["backward_us" if backward else "forward_us"]))
    largest = max(found)
    sustained = largest / median(found[largest])
    curve: list[Point] = []
    for flops in sorted(found):
        # The smallest calls are bound by the host, so that a smaller one may have taken longer.
        least = curve[-1][1] if curve else 0.0
        curve.append((flops, max(least, median(found[flops]), flops / sustained)))
    return tuple(curve)
