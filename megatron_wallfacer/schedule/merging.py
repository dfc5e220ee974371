"""Small attention calls are merged: local and gathered rows that see the same columns, and ranks of the last ring step.

Half of a call takes more than half of its time where the call is small. Merging costs copies, and results that leave
together leave later. So the work of a shard against a shard decides
(:func:`megatron_wallfacer.schedule.plan.shard_work`).
"""

from __future__ import annotations

from math import sqrt

from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.sides import OTHERS, Sides

#: Least work of a call: rows x columns x query heads. 4,096 rows and columns of 32 heads run at 89 % of the best
#: measured rate, 2,048 at 57 % (docs/planning.md).
LEAST_WORK = 2**29
#: Merged ring steps, of calls with the least work, that are worth the copy of a shard of the stationary operand. A
#: merged step saves about as much time at any size; the time of a copy grows with the tokens.
STEPS_PER_COPY = 2


def merges_rows(sides: Sides, groups: int) -> bool:
    """Whether local and gathered rows of the stationary operand are one block, and their results one accumulator.

    Args:
        sides: what the rank has of the two sides.
        groups: head groups.
    """
    # A part of the rows of a block can be computed alone, but not a part of its columns.
    cut_by_rows = sides.resident == "q" or sides.published
    work = _call_work(sides.plan, groups)
    if OTHERS not in sides.resident_parts or not cut_by_rows or work > LEAST_WORK:
        return False
    # Rows that were gathered from one rank are read where they arrive, and their results are sent where they are.
    copies = 1 if len(sides.team(sides.resident)) > 2 else 4
    return sides.merged_steps >= max(1, STEPS_PER_COPY * copies * sqrt(work / LEAST_WORK))


def ranks_per_call(plan: Plan, groups: int) -> int:
    """Return of how many ranks the gathered rows are computed, and sent home, in one call of the last ring step.

    Args:
        plan: grid and choices.
        groups: head groups.
    """
    return max(1, int(LEAST_WORK / max(1, _call_work(plan, groups))))


def _call_work(plan: Plan, groups: int) -> float:
    """Work of a call for one shard against one shard; unlimited where sizes are not known.

    A head axis of U ranks has U times the rows and columns, and a U-th of the heads.
    """
    return float("inf") if plan.shard_work is None else plan.shard_work * plan.grid.head / groups
