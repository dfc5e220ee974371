"""Communication volume in closed form. Tests compare it with the volume counted from the schedules.

Units: elements received per rank and attention layer, in query shards of n*H elements, where n is the tokens per rank
and H the query width (heads x head dim). kappa is kv heads / query heads. After the exchange along ``head`` a rank has
U times the tokens and 1/U of the heads, so a query shard has n*H elements on every grid. A key shard has kappa*n*H,
times ``rho`` if there are fewer kv heads than ranks of the head axis, so that several ranks have the same kv head.
"""

from __future__ import annotations

from megatron_wallfacer.schedule.plan import Plan, RingOperand

#: Weight of one element of the inputs, and of one element of partial results and gradients.
Sizes = tuple[float, float]


def forward_volume(plan: Plan, kappa: float, *, kv_heads: int | None = None, sizes: Sizes = (1, 1)) -> float:
    """Return the volume of the forward pass: Q in and partial O out; K and V in.

    Args:
        plan: grid and choices.
        kappa: kv heads / q heads.
        kv_heads: number of kv heads; enough for the head axis unless given.
        sizes: weights of an element; with the bytes of an element the volume is in bytes per n*H.
    """
    width = kappa * _copies(plan, kv_heads)
    given, summed = sizes
    q, kv = given + summed, 2 * width * given
    shards = {operand: _shards(plan, operand, backward=False) for operand in ("q", "kv")}
    return (q + kv) * _exchanged(plan) + q * shards["q"] + kv * shards["kv"]


def backward_volume(
    plan: Plan, kappa: float, *, kv_heads: int | None = None, keep_gathered_q: bool = False, sizes: Sizes = (1, 1)
) -> float:
    """Return the volume of the backward pass: Q and dO in, dQ out; K and V in, dK and dV out.

    The exchanged q, k, v are kept from forward, so that only dO, dQ, dK and dV are exchanged along ``head``.

    Args:
        plan: grid and choices.
        kappa: kv heads / q heads.
        kv_heads: number of kv heads; enough for the head axis unless given.
        keep_gathered_q: whether forward keeps the gathered queries, which are then not gathered again.
        sizes: weights of an element; with the bytes of an element the volume is in bytes per n*H.
    """
    width = kappa * _copies(plan, kv_heads)
    given, summed = sizes
    q, kv = 2 * given + summed, 2 * width * (given + summed)
    exchange = (given + summed + 2 * width * summed) * _exchanged(plan)
    # In the permuted order pass-Q gathers queries of other ranks than the team, which the other pass cannot reuse.
    gathered_otherwise = plan.kv_order == "permuted" and "pass-q" in (plan.forward, plan.backward)
    saved = plan.grid.team - 1 if keep_gathered_q and not gathered_otherwise else 0
    shards = {operand: _shards(plan, operand, backward=True) for operand in ("q", "kv")}
    return exchange + q * shards["q"] - given * saved + kv * shards["kv"]


def busiest_rank(plan: Plan) -> int:
    """Return a rank with the largest volume. All ranks are equal, except that some keep their block in paper order."""
    return plan.grid.rank({axis: 0 for axis in plan.grid.placement} | {"team": min(1, plan.grid.team - 1)})


def _exchanged(plan: Plan) -> float:
    """Return the part of a shard that other ranks send when heads are divided over U ranks."""
    return (plan.grid.head - 1) / plan.grid.head


def _copies(plan: Plan, kv_heads: int | None) -> float:
    """Return rho, the number of ranks of the head axis that have the same kv head."""
    return 1 if kv_heads is None else max(1, plan.grid.head / kv_heads)


def _is_permuted(plan: Plan) -> bool:
    return plan.kv_order != "native" and plan.grid.team > 1


def _shards(plan: Plan, operand: RingOperand, *, backward: bool) -> int:
    """Return the number of shards of one tensor of an operand that a rank receives, in a gather or from the ring."""
    grid = plan.grid
    team = grid.team if operand == "q" else grid.kv_team
    if operand != plan.ring_operand(backward=backward):
        return team - 1
    if not _is_permuted(plan):
        return team * grid.ring - 1
    # The permutation is one more transfer than the ring has hops: of blocks, or of shards before they are gathered.
    return team * grid.ring + (team - 1 if plan.kv_order == "paper" else 0)
