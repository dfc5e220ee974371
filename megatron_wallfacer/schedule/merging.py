"""Decide which small attention calls are merged: those for local and gathered rows, or those for several ranks.

Two small calls take longer than one call with the rows of both. However, a merged call needs copied rows, and its
results are sent later. Calls are merged if the attention of one query shard to one key shard is little work
(:func:`megatron_wallfacer.schedule.plan.shard_work`).
"""

from __future__ import annotations

from math import sqrt

from megatron_wallfacer.schedule.operands import OperandRows
from megatron_wallfacer.schedule.ops import GATHERED
from megatron_wallfacer.schedule.plan import Plan

#: Least work of an unmerged call: rows x columns x query heads. Calls of 4,096 rows and columns with 32 heads reach
#: 89 % of the highest measured rate, calls of 2,048 rows and columns 57 % (docs/planning.md).
LEAST_WORK = 2**29
#: Number of merged ring steps, at the least work, that save as much time as copying one shard of the stationary operand
#: costs. The saving of a merged step hardly depends on its size, but the time of a copy grows with the tokens.
STEPS_PER_COPY = 2


def merges_rows(operands: OperandRows, groups: int) -> bool:
    """Return whether one attention call computes local and gathered rows of the stationary operand together."""
    # An attention call may compute some rows of a block, but not some of its columns.
    is_cut_by_rows = operands.stationary == "q" or operands.is_permuted
    work = _call_work(operands.plan, groups)
    if GATHERED not in operands.stationary_rows or not is_cut_by_rows or work > LEAST_WORK:
        return False
    # Without merging, rows from a single rank need no copies: they are read, and their results sent, where they are.
    copies = 1 if len(operands.team(operands.stationary)) > 2 else 4
    return operands.merged_steps >= max(1, STEPS_PER_COPY * copies * sqrt(work / LEAST_WORK))


def ranks_per_call(plan: Plan, groups: int) -> int:
    """Return the number of team members whose results one attention call computes in the last ring step."""
    return max(1, int(LEAST_WORK / max(1, _call_work(plan, groups))))


def _call_work(plan: Plan, groups: int) -> float:
    """Return the work of an attention call of one query shard and one key shard; infinite if sizes are unknown.

    With a head axis of U ranks, query and key shards are U times as long, and have 1/U of the heads.
    """
    return float("inf") if plan.shard_work is None else plan.shard_work * plan.grid.head / groups
