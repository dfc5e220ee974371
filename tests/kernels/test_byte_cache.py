"""A cache that is bounded by bytes."""

from __future__ import annotations

import torch

from megatron_wallfacer.kernels.byte_cache import byte_cache
from megatron_wallfacer.kernels.windows import _LIMIT, cu_seqlens_tensor


def test_entries_are_made_once_and_never_weigh_more_than_the_limit() -> None:
    made: list[tuple[int, ...]] = []

    @byte_cache(100, len)
    def double(numbers: tuple[int, ...]) -> tuple[int, ...]:
        made.append(numbers)
        return numbers * 2

    first, second, third = ((number,) * 40 for number in range(3))
    for numbers in (first, second, first, second):
        assert double(numbers) == numbers * 2
    assert made == [first, second]
    double(third)
    double(third)
    double(first)
    assert made == [first, second, third, first]


def test_a_result_larger_than_the_limit_is_made_once_and_kept_alone() -> None:
    made: list[int] = []
    cached = byte_cache(10, lambda number: 20)(lambda number: made.append(number) or number)
    assert [cached(1), cached(1), cached(2), cached(1)] == [1, 1, 2, 1]
    assert made == [1, 2, 1]


def test_boundaries_of_many_documents_do_not_fill_memory() -> None:
    """A thousand batches of 65,536 documents: before, all were kept."""
    boundaries = tuple(range(65537))
    batch = cu_seqlens_tensor(boundaries, torch.device("cpu"))
    assert cu_seqlens_tensor(tuple(range(65537)), torch.device("cpu")) is batch
    alive = _LIMIT // (44 * len(boundaries)) + 1
    for start in range(alive):
        cu_seqlens_tensor((0, *range(start + 1, start + 65537)), torch.device("cpu"))
    assert cu_seqlens_tensor(boundaries, torch.device("cpu")) is not batch
