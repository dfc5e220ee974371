"""Words that a rank receives, in closed form; the tests hold them against what is counted from the schedules.

Units: words per rank and attention layer, divided by n*H, where n is the tokens of a rank and H the query width
(heads x head dim). kappa is kv heads / q heads. After the exchange along ``head`` a rank has U times the tokens and
1/U of the heads, so that a query shard is n*H on every grid; a key shard is kappa*n*H, times ``rho`` where there are
fewer kv heads than ranks to divide them and several ranks have the same one.
"""

from __future__ import annotations

from megatron_wallfacer.schedule.plan import Plan, Rider

#: What one element counts: in the dtype of the inputs, and in the dtype of partial results and gradients.
Sizes = tuple[float, float]


def forward_words(plan: Plan, kappa: float, *, kv_heads: int | None = None, sizes: Sizes = (1, 1)) -> float:
    """Words of the forward pass: Q in and partial O out; K and V in.

    Args:
        plan: grid and choices.
        kappa: kv heads / q heads.
        kv_heads: how many there are; as many as the head axis can divide unless given.
        sizes: what one element counts; the bytes of an element give bytes.
    """
    width = kappa * _copies(plan, kv_heads)
    given, summed = sizes
    q, kv = given + summed, 2 * width * given
    return (q + kv) * _exchanged(plan) + q * _shards(plan, "q", plan.forward) + kv * _shards(plan, "kv", plan.forward)


def backward_words(
    plan: Plan, kappa: float, *, kv_heads: int | None = None, q_kept: bool = False, sizes: Sizes = (1, 1)
) -> float:
    """Words of the backward pass: Q and dO in, dQ out; K and V in, dK and dV out.

    The exchanged q, k, v are kept from forward, so that only dO, dQ, dK and dV are exchanged along ``head``.

    Args:
        plan: grid and choices.
        kappa: kv heads / q heads.
        kv_heads: how many there are; as many as the head axis can divide unless given.
        q_kept: the team's queries are kept from forward and not gathered again.
        sizes: what one element counts; the bytes of an element give bytes.
    """
    width = kappa * _copies(plan, kv_heads)
    given, summed = sizes
    q, kv = 2 * given + summed, 2 * width * (given + summed)
    exchange = (given + summed + 2 * width * summed) * _exchanged(plan)
    # Permuted queries that ride are gathered from other ranks than those of the team, so the passes differ in them.
    gathered_otherwise = plan.kv_order == "permuted" and "q" in (plan.forward, plan.backward)
    saved = plan.grid.team - 1 if q_kept and not gathered_otherwise else 0
    return exchange + q * _shards(plan, "q", plan.backward) - given * saved + kv * _shards(plan, "kv", plan.backward)


def busiest_rank(plan: Plan) -> int:
    """A rank that receives as much as any. All do, but that the published order leaves some ranks their block."""
    return plan.grid.rank({axis: 0 for axis in plan.grid.placement} | {"team": min(1, plan.grid.team - 1)})


def _exchanged(plan: Plan) -> float:
    """Part of a shard that comes from others when heads are divided over U ranks."""
    return (plan.grid.head - 1) / plan.grid.head


def _copies(plan: Plan, kv_heads: int | None) -> float:
    """rho: ranks of the head axis that have the same kv head."""
    return 1 if kv_heads is None else max(1, plan.grid.head / kv_heads)


def _published(plan: Plan) -> bool:
    return plan.kv_order != "native" and plan.grid.team > 1


def _shards(plan: Plan, side: Rider, rider: Rider) -> int:
    """Shards of one tensor of a side that come to a rank; of a result of that side, shards that come home."""
    grid = plan.grid
    team = grid.team if side == "q" else grid.kv_team
    if side != rider:
        return team - 1
    if not _published(plan):
        return team * grid.ring - 1
    # One move more than the ring has hops: of gathered blocks in the paper, of single shards if they are moved first.
    return team * grid.ring + (team - 1 if plan.kv_order == "paper" else 0)
