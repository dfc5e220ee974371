"""Lower bounds on the communication volume: the elements that a rank must receive (``docs/schemes.md``).

A volume is the number of elements that a rank receives for one attention layer. Its unit is a query shard of n*H
elements: n is the tokens per rank, and H the query width (heads x head dim). kappa is kv heads / query heads. If the
work of a rank covers x query shards and y key shards, balance requires x*y >= P. A rank receives x - 1 query shards and
y - 1 key shards, because one query shard and one key shard are local.

Each pass has two bounds. The general bound applies to every scheme, because x and y may be any real numbers. The bound
*for whole shards* applies to schemes that do not divide shards, so that x and y are integers. The bounds assume that
the heads of a token stay together. Schemes that divide heads can have less volume than the bounds.
"""

from __future__ import annotations


def forward_bound(cp_size: int, kappa: float, *, whole: bool = False) -> float:
    """Return the lower bound of the forward volume: the least 2(x-1) + 2 kappa (y-1) for x*y >= P.

    A rank receives Q and partial O of x - 1 query shards, and K and V of y - 1 key shards. If sqrt(kappa P) >= 1, the
    minimum is 4 sqrt(kappa P) - 2(1 + kappa). With ``whole``, x and y are integers.
    """
    return _minimum(cp_size, 2, 2 * kappa, whole=whole)


def backward_bound(cp_size: int, kappa: float, *, whole: bool = False) -> float:
    """Return the lower bound of the backward volume: the least 3(x-1) + 4 kappa (y-1) for x*y >= P.

    A rank receives Q, dO and dQ of x - 1 query shards, and K, V, dK and dV of y - 1 key shards. If P > 1 and
    sqrt(4 kappa P / 3) >= 1, the minimum is 2 sqrt(12 kappa P) - (3 + 4 kappa). With ``whole``, x and y are integers.
    """
    return _minimum(cp_size, 3, 4 * kappa, whole=whole)


def _minimum(cp_size: int, q_tensors: float, kv_tensors: float, *, whole: bool) -> float:
    if whole:
        # For each number of query shards, y is the least number of key shards with at least P pairs.
        return min(q_tensors * (x - 1) + kv_tensors * (-(-cp_size // x) - 1) for x in range(1, cp_size + 1))
    # One query shard and one key shard are local, so neither x nor y can be below one.
    x = min(max((kv_tensors * cp_size / q_tensors) ** 0.5, 1.0), float(cp_size))
    return q_tensors * (x - 1) + kv_tensors * (cp_size / x - 1)


def ratio(volume: float, bound: float) -> float:
    """Return the communication volume divided by its lower bound; 1 if both are 0."""
    if volume == 0:
        return 1.0
    return volume / bound if bound > 0 else float("inf")
