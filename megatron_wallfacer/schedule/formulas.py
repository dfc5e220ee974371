"""Formulas of the communication volume, which tests compare with the volume counted in schedules.

A volume is the number of elements that a rank receives for one attention layer. Its unit is a query shard of n*H
elements: n is the tokens per rank, and H the query width (heads x head dim). kappa is kv heads / query heads. After the
exchange along a head axis of U ranks, a rank has U times the tokens and 1/U of the heads, so a query shard has n*H
elements on every grid. A key shard has kappa*n*H elements. If the head axis has more ranks than kv heads, several ranks
have the same kv head. Then a key shard has rho*kappa*n*H elements, where rho is the number of these ranks.
"""

from __future__ import annotations

from megatron_wallfacer.schedule.plan import Plan, RingOperand

#: Weights of an element of the inputs, and of an element of partial results and gradients.
Sizes = tuple[float, float]


def forward_volume(plan: Plan, kappa: float, *, kv_heads: int | None = None, sizes: Sizes = (1, 1)) -> float:
    """Return the volume that a rank receives in the forward pass: Q, K, V and partial O.

    Args:
        plan: grid and choices.
        kappa: kv heads / q heads.
        kv_heads: number of kv heads; None if there are at least as many kv heads as ranks of the head axis.
        sizes: size of an input element, and size of an element of partial results and gradients. If these are in bytes,
            the result is the number of received bytes, divided by n*H.
    """
    width = kappa * _copies(plan, kv_heads)
    given, summed = sizes
    q, kv = given + summed, 2 * width * given
    shards = {operand: _shards(plan, operand, backward=False) for operand in ("q", "kv")}
    return (q + kv) * _exchanged(plan) + q * shards["q"] + kv * shards["kv"]


def backward_volume(
    plan: Plan, kappa: float, *, kv_heads: int | None = None, keep_gathered_q: bool = False, sizes: Sizes = (1, 1)
) -> float:
    """Return the volume of the backward pass. A rank receives Q, dO, dQ, K, V, dK and dV.

    Forward keeps the exchanged q, k, v, so that backward exchanges only dO, dQ, dK and dV along ``head``. With
    ``keep_gathered_q`` backward does not gather queries again. The other arguments are those of :func:`forward_volume`.
    """
    width = kappa * _copies(plan, kv_heads)
    given, summed = sizes
    q, kv = 2 * given + summed, 2 * width * (given + summed)
    exchange = (given + summed + 2 * width * summed) * _exchanged(plan)
    # In the permuted order pass-Q gathers queries of ranks outside the team, which pass-KV cannot reuse.
    gathered_otherwise = plan.kv_order == "permuted" and "pass-q" in (plan.forward, plan.backward)
    saved = plan.grid.team - 1 if keep_gathered_q and not gathered_otherwise else 0
    shards = {operand: _shards(plan, operand, backward=True) for operand in ("q", "kv")}
    return exchange + q * shards["q"] - given * saved + kv * shards["kv"]


def busiest_rank(plan: Plan) -> int:
    """Return a rank that receives the largest volume. With ``kv_order="paper"`` some ranks receive less."""
    return plan.grid.rank({axis: 0 for axis in plan.grid.placement} | {"team": min(1, plan.grid.team - 1)})


def _exchanged(plan: Plan) -> float:
    """Return the fraction of a shard that a rank receives in the all-to-all along the head axis."""
    return (plan.grid.head - 1) / plan.grid.head


def _copies(plan: Plan, kv_heads: int | None) -> float:
    """Return rho, the number of ranks along the head axis that have the same kv head."""
    return 1 if kv_heads is None else max(1, plan.grid.head / kv_heads)


def _shards(plan: Plan, operand: RingOperand, *, backward: bool) -> int:
    """Return the number of shards that a rank receives from its team and the ring, for one tensor of ``operand``."""
    grid = plan.grid
    team = grid.team if operand == "q" else grid.kv_team
    if operand != plan.ring_operand(backward=backward):
        return team - 1
    if plan.kv_order == "native" or grid.team == 1:
        return team * grid.ring - 1
    # The permutation adds one transfer to the hops of the ring: of a block, or of a shard that is gathered afterwards.
    return team * grid.ring + (team - 1 if plan.kv_order == "paper" else 0)
