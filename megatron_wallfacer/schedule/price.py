"""Estimated seconds of one attention layer, by which the scheme ``auto`` selects a grid.

::

    seconds  = max(compute, transfer) + EXPOSED * transfer                       both passes together
    compute  = FLOPs per rank / RATES + calls * CALL_US                          a sum over the passes
    calls    = ring steps + team - 1 + (1 if kv_team > 1)                        attention calls of one pass
    transfer = bytes received per rank / link rate

The estimated time only depends on the arguments, so every rank selects the same grid. The constants are those of the
shipped clusters ``h100-8x8`` and ``h200-8x8`` (``configs/cluster``). Kernels and host time were measured on one H200.
The link rates are assumptions. The estimate ignores placement, head groups, and the overlap of gathers.
``--wallfacer-cluster`` selects the grid by a simulation that models placement, head groups and overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_wallfacer.schedule.formulas import backward_volume, forward_volume
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan

#: FLOPs per second of large attention calls, forward and backward.
RATES = (676e12, 531e12)
#: FLOPs per unmasked pair of query and key and per channel of a query head, forward and backward.
PAIR_FLOPS = (4, 10)
#: Channels per head of the measured calls.
HEAD_DIM = 128
#: Microseconds of host time per ring step, forward and backward: attention call + three other launches + transfer.
CALL_US = (115 + 3 * 10 + 50, 185 + 3 * 10 + 50)
#: Bytes of an element in bf16, and of an element of a partial result or gradient.
SIZES = (2, 4)
#: Assumed links, in bytes per second received by a rank: NVLink inside a node of ``NODE`` GPUs, else one 400 Gbit/s NIC
#: per GPU.
NODE, NVLINK, NIC = 8, 360e9, 45e9
#: Part of the transfer time that nothing hides. Among values from 0.2 to 0.5 it agrees best with the simulator at up to
#: 8 ranks.
EXPOSED = 0.3
#: Ratio up to which two prices count as equal, because the price is an estimate. Among equal plans, a plan with less
#: memory may receive up to ``MORE_BYTES`` times the fewest bytes. A larger ratio would rely on the assumed link rates.
TIE, MORE_BYTES = 1.05, 1.2


def cheapest(plans: Sequence[Plan], tokens: int, q_heads: int, kv_heads: int, *, ranks_per_node: int = NODE) -> Plan:
    """Return the best plan: fast, then little communication, then little memory.

    Plans that are slower than :data:`TIE` times the shortest time are dropped first. Of the others, plans that receive
    more than :data:`MORE_BYTES` times the fewest bytes are dropped. The plan with the least memory remains. Tokens and
    heads are per rank.
    """
    options = {"tokens": tokens, "q_heads": q_heads, "kv_heads": kv_heads}
    prices = [layer_seconds(plan, **options, ranks_per_node=ranks_per_node) for plan in plans]
    equal = [plan for plan, price in zip(plans, prices, strict=True) if price <= TIE * min(prices)]
    most_bytes = MORE_BYTES * min(received_bytes(plan, **options) for plan in equal)
    few = [plan for plan in equal if received_bytes(plan, **options) <= most_bytes]

    def held(plan: Plan) -> tuple[float, ...]:
        # Heads x shards of gathered blocks. Ties prefer a ring to a gather, then the fewest received bytes.
        grid = plan.grid
        blocks = grid.team * q_heads + 2 * grid.kv_team * kv_heads
        return blocks, grid.kv_team, received_bytes(plan, **options)

    return min(few, key=held)


def layer_seconds(plan: Plan, tokens: int, q_heads: int, kv_heads: int, *, ranks_per_node: int = NODE) -> float:
    """Return the estimated seconds of one causal attention layer, forward and backward.

    The arguments are those of :func:`cheapest`.
    """
    cp_size, calls = plan.grid.cp_size, attention_calls(plan.grid)
    pairs = tokens * tokens * cp_size / 2
    compute = sum(
        pairs * q_heads * HEAD_DIM * flops / rate + calls * call_us * 1e-6
        for flops, rate, call_us in zip(PAIR_FLOPS, RATES, CALL_US, strict=True)
    )
    transfer = received_bytes(plan, tokens, q_heads, kv_heads) / (NVLINK if cp_size <= ranks_per_node else NIC)
    return max(compute, transfer) + EXPOSED * transfer


def received_bytes(plan: Plan, tokens: int, q_heads: int, kv_heads: int) -> float:
    """Return the bytes that a rank receives for one layer, forward and backward, without softmax statistics."""
    options = {"kappa": kv_heads / q_heads, "kv_heads": kv_heads, "sizes": SIZES}
    received = forward_volume(plan, **options) + backward_volume(plan, **options)
    # Rounding makes sums in different orders equal.
    return round(received, 9) * tokens * q_heads * HEAD_DIM


def attention_calls(grid: Grid) -> int:
    """Return the approximate number of attention calls of one pass.

    Each ring step calls the attention kernel once. A rank that gathers queries also calls the kernel once for each
    other rank of its team. A rank that gathers keys also calls the kernel once for its local keys.
    """
    return grid.ring + grid.team - 1 + (grid.kv_team > 1)
