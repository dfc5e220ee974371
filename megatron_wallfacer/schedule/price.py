"""The price of a grid, which the scheme ``auto`` minimises: an estimate of the time of one attention layer.

::

    seconds  = max(compute, transfer) + EXPOSED * transfer                       both passes together
    compute  = FLOPs per rank / RATES + calls * CALL_US                          a sum over the passes
    calls    = ring steps + team - 1 + (1 if kv_team > 1)                        attention calls of one pass
    transfer = bytes received per rank / link rate

Pure arithmetic on the arguments, so every rank finds the same grid. The costs are those of the shipped clusters
``h100-8x8`` and ``h200-8x8`` (``configs/cluster``): kernels and host time measured on one H200, links assumed. The
formula leaves out placement, head groups, and how much of a gather is hidden. ``--wallfacer-cluster`` simulates those.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_wallfacer.schedule.formulas import backward_volume, forward_volume
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan

#: FLOPs per second of large attention calls, forward and backward.
RATES = (676e12, 531e12)
#: FLOPs of an unmasked pair of query and key for each channel of each query head, forward and backward.
PAIR_FLOPS = (4, 10)
#: Channels per head of the measured calls.
HEAD_DIM = 128
#: Microseconds of the host for a ring step: an attention call (forward, backward), three other launches, a transfer.
CALL_US = (115 + 3 * 10 + 50, 185 + 3 * 10 + 50)
#: Bytes of an element in bf16, and of a partial result or gradient.
SIZES = (2, 4)
#: Assumed links, in bytes per second received by a rank: NVLink in a node of ``NODE`` GPUs, else a 400 Gbit/s NIC per
#: GPU.
NODE, NVLINK, NIC = 8, 360e9, 45e9
#: Part of the transfers that nothing hides. Of 0.2 to 0.5 the value that is nearest to the simulator at up to 8 ranks.
EXPOSED = 0.3
#: Prices this close count as equal, for the formula is no better than that. Of equals one that receives up to so many
#: times the fewest bytes may be taken to hold less memory; not more, for the network may be slower than is assumed.
TIE, MORE_BYTES = 1.05, 1.2


def cheapest(plans: Sequence[Plan], tokens: int, q_heads: int, kv_heads: int, *, ranks_per_node: int = NODE) -> Plan:
    """Return the plan that holds the least of those with the lowest price and the fewest received bytes.

    Prices up to :data:`TIE` times the lowest count as equal, and among those bytes up to :data:`MORE_BYTES` times the
    fewest.

    Args:
        plans: candidates for the same ranks.
        tokens: tokens per rank.
        q_heads: query heads per rank.
        kv_heads: key and value heads per rank.
        ranks_per_node: ranks of the context-parallel group in one node.
    """
    options = {"tokens": tokens, "q_heads": q_heads, "kv_heads": kv_heads}
    prices = [layer_seconds(plan, **options, ranks_per_node=ranks_per_node) for plan in plans]
    equal = [plan for plan, price in zip(plans, prices, strict=True) if price <= TIE * min(prices)]
    most_bytes = MORE_BYTES * min(received_bytes(plan, **options) for plan in equal)
    few = [plan for plan in equal if received_bytes(plan, **options) <= most_bytes]

    def held(plan: Plan) -> tuple[float, ...]:
        """Heads x shards of gathered blocks; then a ring before a gather, and the fewest bytes."""
        grid = plan.grid
        blocks = grid.team * q_heads + 2 * grid.kv_team * kv_heads
        return blocks, grid.kv_team, received_bytes(plan, **options)

    return min(few, key=held)


def layer_seconds(plan: Plan, tokens: int, q_heads: int, kv_heads: int, *, ranks_per_node: int = NODE) -> float:
    """Return the price: estimated seconds of one causal attention layer, forward and backward.

    Args:
        plan: grid and choices.
        tokens: tokens per rank.
        q_heads: query heads per rank.
        kv_heads: key and value heads per rank.
        ranks_per_node: ranks of the context-parallel group in one node.
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
    """Return the bytes that a rank receives for one layer, forward and backward, without statistics.

    Args:
        plan: grid and choices.
        tokens: tokens per rank.
        q_heads: query heads per rank.
        kv_heads: key and value heads per rank.
    """
    options = {"kappa": kv_heads / q_heads, "kv_heads": kv_heads, "sizes": SIZES}
    received = forward_volume(plan, **options) + backward_volume(plan, **options)
    # Equal sums of different order are equal.
    return round(received, 9) * tokens * q_heads * HEAD_DIM


def attention_calls(grid: Grid) -> int:
    """Return the approximate number of attention calls of one pass.

    One for each ring step. Where queries are gathered, one more for each other rank of the team, whose rows are
    computed before they are sent back. Where keys are gathered, one more for the local keys before others arrive.
    """
    return grid.ring + grid.team - 1 + (grid.kv_team > 1)
