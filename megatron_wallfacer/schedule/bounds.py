"""Lower bounds on the words a rank must receive (``docs/design.md``).

Units: words per rank and attention layer, divided by n*H, where n is the tokens of a rank and H the
query width (heads x head dim). kappa is kv heads / q heads. Let a rank's work project on x query
shards and y key shards. Balanced work needs x*y >= P; it receives what it does not own.

There are two bounds of each kind. In the plain one x and y are real numbers, which holds whatever a rank's work is
made of. The one *of whole shards* lets x and y be integers only: no scheme that assigns whole shards can do better, and
where P has no fitting divisors it is what "best possible" means. Both are for schemes that keep the heads of a token
together. Dividing heads is a third dimension, with words below these bounds.
"""

from __future__ import annotations


def forward_bound(cp_size: int, kappa: float) -> float:
    """min 2(x-1) + 2 kappa (y-1) over x*y = P: Q in and partial O out, K and V in.

    For 1 <= sqrt(kappa P) this is 4 sqrt(kappa P) - 2(1 + kappa).
    """
    return _minimum(cp_size, q_tensors=2, kv_tensors=2 * kappa)


def backward_bound(cp_size: int, kappa: float) -> float:
    """min 3(x-1) + 4 kappa (y-1) over x*y = P: Q, dO in and dQ out, K, V in and dK, dV out.

    For 1 <= sqrt(4 kappa P / 3) this is 2 sqrt(12 kappa P) - (3 + 4 kappa).
    """
    return _minimum(cp_size, q_tensors=3, kv_tensors=4 * kappa)


def whole_forward_bound(cp_size: int, kappa: float) -> float:
    """min 2(x-1) + 2 kappa (y-1) over integers with x*y >= P."""
    return _whole_minimum(cp_size, q_tensors=2, kv_tensors=2 * kappa)


def whole_backward_bound(cp_size: int, kappa: float) -> float:
    """min 3(x-1) + 4 kappa (y-1) over integers with x*y >= P."""
    return _whole_minimum(cp_size, q_tensors=3, kv_tensors=4 * kappa)


def _minimum(cp_size: int, *, q_tensors: float, kv_tensors: float) -> float:
    # A rank owns one shard of each side already, so neither projection can be below one.
    x = min(max((kv_tensors * cp_size / q_tensors) ** 0.5, 1.0), float(cp_size))
    return q_tensors * (x - 1) + kv_tensors * (cp_size / x - 1)


def _whole_minimum(cp_size: int, *, q_tensors: float, kv_tensors: float) -> float:
    # For a number of query shards the fewest key shards that make P pairs.
    return min(q_tensors * (x - 1) + kv_tensors * (-(-cp_size // x) - 1) for x in range(1, cp_size + 1))


def ratio(words: float, bound: float) -> float:
    """Words over their bound; 1 where neither moves anything."""
    if words == 0:
        return 1.0
    return words / bound if bound > 0 else float("inf")
