"""Rows of values in memory, and slices of operands by rows and heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_wallfacer.schedule.layout import runs
from megatron_wallfacer.schedule.program import Operand

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rows:
    """The place in memory of some rows of a value.

    Attributes:
        tensors: operands ``[rows, batch, heads, channels]``, statistics ``[rows, batch, heads]``, by name.
        chunks: chunk ids of the rows, ascending.
        as_bytes: all tensors as one operand of bytes; None if the tensors are not in one buffer.
    """

    tensors: Mapping[str, Operand]
    chunks: tuple[int, ...]
    as_bytes: Operand | None = None


def cut(operand: Operand, rows: Range) -> Operand:
    """Return the slice of an operand that has only the given rows."""
    buffer, view, shape, strides, offset = operand
    # Called at least once per document. The constructor is several times faster than `_replace`.
    return Operand(buffer, view, (rows[1] - rows[0], *shape[1:]), strides, offset + rows[0] * strides[0])


def cut_heads(operand: Operand, heads: range) -> Operand:
    """Return the slice of an operand ``[rows, batch, heads, ...]`` that has only the given heads."""
    rows, batch, _, *rest = operand.shape
    offset = operand.offset + heads.start * operand.strides[2]
    return operand._replace(shape=(rows, batch, len(heads), *rest), offset=offset)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor with the given shape, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def common_rows(source: Sequence[int], into: Sequence[int], chunks: Iterable[int]) -> Iterator[tuple[Range, Range]]:
    """Divide ``chunks`` into as few pieces as possible, each of them contiguous in both blocks.

    Yield a pair of index ranges for each piece: in ``source`` and in ``into``. Both blocks must contain all ``chunks``,
    which must be ascending.
    """
    here = {chunk: index for index, chunk in enumerate(into)}
    for first, end in runs(tuple(chunks), source):
        places = [here[chunk] for chunk in source[first:end]]
        start = 0
        for index in range(1, len(places) + 1):
            if index == len(places) or places[index] != places[index - 1] + 1:
                yield (first + start, first + index), (places[start], places[index - 1] + 1)
                start = index


def placed_rows(rows: Range, block: Sequence[int], into: Sequence[int], chunk: int) -> Iterator[tuple[Range, Range]]:
    """Yield pairs of row ranges with the same tokens: the first in ``block``, the second in ``into``.

    Args:
        rows: range of token rows of ``block``.
        block: chunk ids of the first block.
        into: chunk ids of the second block, which has all chunks of the first block.
        chunk: number of tokens of a chunk.
    """
    if block == into:
        yield rows, rows
        return
    for here, there in common_rows(block, into, block):
        first, end = max(rows[0], here[0] * chunk), min(rows[1], here[1] * chunk)
        if first < end:
            ahead = (there[0] - here[0]) * chunk
            yield (first, end), (first + ahead, end + ahead)


def moved(rows: Range, by: int) -> Range:
    """Return a range of rows shifted by a number of rows."""
    return rows[0] + by, rows[1] + by
