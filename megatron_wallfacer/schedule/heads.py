"""How heads are divided: U ranks of the ``head`` axis, and on each rank groups that are pipelined.

The query heads are cut into U x groups equal *parts*, rank by rank. A part needs the kv heads of its query heads;
where there are fewer kv heads than parts, several parts have the same kv head and its words are moved for each.
"""

from __future__ import annotations

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.plan import Plan


def check_heads(plan: Plan, q_heads: int, kv_heads: int) -> None:
    """Whether the head axis can divide these heads.

    Raises:
        OptionError: it cannot; says which sizes can.
    """
    size = plan.grid.head
    if q_heads % size or (kv_heads % size and size % kv_heads):
        fitting = [u for u in range(1, q_heads + 1) if q_heads % u == 0 and (kv_heads % u == 0 or u % kv_heads == 0)]
        raise OptionError(
            "head_size", size, f"one of {', '.join(map(str, fitting))} for {q_heads} query and {kv_heads} kv heads"
        )


def head_groups(plan: Plan, q_heads: int, kv_heads: int) -> int:
    """Groups that are pipelined: the most, up to those of the plan, that leave no kv head in two of them."""
    size = plan.grid.head
    wanted = range(min(plan.head_groups, q_heads), 1, -1)
    return next((g for g in wanted if q_heads % (size * g) == 0 and kv_heads % (size * g) == 0), 1)


def part_heads(part: int, parts: int, q_heads: int, kv_heads: int) -> tuple[range, range]:
    """Query heads and kv heads of one part."""
    width = q_heads // parts
    first, group = part * width, q_heads // kv_heads
    return range(first, first + width), range(first // group, (first + width - 1) // group + 1)
