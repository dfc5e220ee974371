"""Factorisations of a number of ranks into sizes of axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isqrt


def divisors(number: int) -> tuple[int, ...]:
    """Return all divisors, ascending."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return (*small, *(number // d for d in reversed(small) if d * d != number))


def factorisations(number: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
    """Yield every way to write a number as the product of the sizes of some axes."""
    first, *rest = axes
    if not rest:
        yield {first: number}
        return
    for size in divisors(number):
        for others in factorisations(number // size, rest):
            yield {first: size, **others}
