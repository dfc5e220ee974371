"""Join copies: evenly spaced copies become one strided copy, and copies of reordered blocks become a permutation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import gcd, prod
from typing import NamedTuple

from megatron_wallfacer.schedule.program import WORKSPACE, Operand
from megatron_wallfacer.schedule.rows import contiguous
from megatron_wallfacer.schedule.workspace import ALIGNMENT

#: (destination, source) of one copy.
Pair = tuple[Operand, Operand]
#: Largest number of pairs that remain strided copies. More pairs become a permutation if possible.
STRIDED = 2
#: Smallest block of a permutation in bytes, and largest number of blocks.
SMALLEST, MOST = 16, 1 << 14


class Permutation(NamedTuple):
    """A copy of blocks of equal size: ``into[i] = source[index[i]]``, with both operands ``[blocks, elements]``."""

    into: Operand
    source: Operand
    index: tuple[int, ...]


class _Block(NamedTuple):
    into: int
    source: int
    nbytes: int


def strided(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the same copies, but with evenly spaced copies joined to one copy with an additional dimension.

    The copies must be independent: no copy writes elements that another copy reads or writes.
    """
    found = list(pairs)
    while len(shorter := _joined(found)) < len(found):
        found = shorter
    return found


def permutation(pairs: Sequence[Pair], itemsize: Callable[[Operand], int], wide: int) -> Permutation | None:
    """Return the same copies as one permutation of blocks; None if they are not a permutation.

    The copies must read contiguous rows of the workspace. The written range may have no gap except padding between
    buffers. Padding is overwritten with block 0 of the source. Blocks are copied in elements of ``wide`` bytes.
    """
    (into, source), *_ = pairs
    if source.buffer != WORKSPACE or not all(_is_block(pair, into.buffer) for pair in pairs):
        return None
    sizes = [itemsize(into) for into, _ in pairs]
    blocks = sorted(
        _Block(into.offset * size, source.offset * size, prod(into.shape) * size)
        for size, (into, source) in zip(sizes, pairs, strict=True)
    )
    first, start = blocks[0].into, min(block.source for block in blocks)
    unit = gcd(*(size for one in blocks for size in (one.into - first, one.source - start, one.nbytes)))
    if into.buffer != WORKSPACE and first:
        return None
    if unit % wide or unit < SMALLEST or first % wide or start % wide or not _fills(blocks):
        return None
    length = (blocks[-1].into + blocks[-1].nbytes - first) // unit
    end = max(block.source + block.nbytes for block in blocks)
    if length > MOST or (into.buffer == WORKSPACE and first < end and start < first + length * unit):
        return None
    index = [0] * length
    for block in blocks:
        at, number = (block.into - first) // unit, (block.source - start) // unit
        index[at : at + block.nbytes // unit] = range(number, number + block.nbytes // unit)
    return Permutation(
        _blocks(into.buffer, first // wide, length, unit // wide),
        _blocks(source.buffer, start // wide, (end - start) // unit, unit // wide),
        tuple(index),
    )


def _is_block(pair: Pair, buffer: str) -> bool:
    into, source = pair
    same = into.buffer == buffer and source.buffer == WORKSPACE and into.view == source.view
    return same and all(one.view != "own" and one.strides == contiguous(one.shape) for one in pair)


def _fills(blocks: Sequence[_Block]) -> bool:
    ends = ((one.into + one.nbytes, after.into) for one, after in pairwise(blocks))
    return all(end == start or (end < start == -(-end // ALIGNMENT) * ALIGNMENT) for end, start in ends)


def _blocks(buffer: str, offset: int, number: int, elements: int) -> Operand:
    shape = number, elements
    return Operand(buffer, "wide", shape, contiguous(shape), offset)


def _joined(pairs: Iterable[Pair]) -> list[Pair]:
    alike: dict[tuple[object, ...], list[Pair]] = {}
    for into, source in pairs:
        key = into.shape, into.buffer, into.view, into.strides, source.buffer, source.view, source.strides
        alike.setdefault(key, []).append((into, source))
    return [pair for group in alike.values() for pair in _series(sorted(group, key=lambda pair: pair[0].offset))]


def _series(pairs: Sequence[Pair]) -> Iterable[Pair]:
    """Join copies at equal distances in memory into one strided copy. All copies must have equal shapes."""
    steps = [
        (after[0].offset - before[0].offset, after[1].offset - before[1].offset) for before, after in pairwise(pairs)
    ]
    first = 0
    while first < len(pairs):
        end = _end_of_series(steps, first)
        # If a longer series begins with the second pair, the first pair does not take it.
        if end == first + 2 and _end_of_series(steps, first + 1) > first + 3:
            end = first + 1
        into, source = pairs[first]
        if end > first + 1:
            number, (into_step, source_step) = end - first, steps[first]
            into, source = (
                one._replace(shape=(number, *one.shape), strides=(step, *one.strides))
                for one, step in ((into, into_step), (source, source_step))
            )
        yield into, source
        first = end


def _end_of_series(steps: Sequence[tuple[int, int]], first: int) -> int:
    if first >= len(steps) or min(steps[first]) <= 0:
        return first + 1
    end = first
    while end < len(steps) and steps[end] == steps[first]:
        end += 1
    return end + 1
