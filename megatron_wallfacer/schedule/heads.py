"""The division of heads over the U ranks of the ``head`` axis, and on each rank into head groups.

The query heads are divided into equal *head slices*. Each rank of the head axis has one head slice per head group. The
head slices of a rank are consecutive. A head slice also has the kv heads that its query heads use. If there are fewer
kv heads than slices, several slices have the same kv head.
"""

from __future__ import annotations

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.plan import Plan


def divides_heads(size: int, q_heads: int, kv_heads: int) -> bool:
    """Return whether a head axis of ``size`` ranks divides the heads."""
    return q_heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def check_heads(plan: Plan, q_heads: int, kv_heads: int) -> None:
    """Check that the size of the head axis divides the heads.

    Raises:
        OptionError: The size does not divide the heads. The message lists the allowed sizes.
    """
    size = plan.grid.head
    if not divides_heads(size, q_heads, kv_heads):
        fitting = [u for u in range(1, q_heads + 1) if divides_heads(u, q_heads, kv_heads)]
        raise OptionError(
            "head_size", size, f"one of {', '.join(map(str, fitting))} for {q_heads} query and {kv_heads} kv heads"
        )


def head_groups(plan: Plan, q_heads: int, kv_heads: int) -> int:
    """Return the largest number of head groups, up to ``plan.head_groups``, for which no two groups share a kv head."""
    size = plan.grid.head
    wanted = range(min(plan.head_groups, q_heads), 1, -1)
    return next((g for g in wanted if q_heads % (size * g) == 0 and kv_heads % (size * g) == 0), 1)


def slice_heads(head_slice: int, head_slices: int, q_heads: int, kv_heads: int) -> tuple[range, range]:
    """Return the query heads and the kv heads of one head slice."""
    width = q_heads // head_slices
    first, group = head_slice * width, q_heads // kv_heads
    return range(first, first + width), range(first // group, (first + width - 1) // group + 1)
