"""Tables of row operations: the copies, fills, sums or merges of one launch, as integers in device memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, prod, sumprod
from typing import NamedTuple

import torch
from torch import Tensor

#: Largest number of buffers of a launch.
BASES = 16
#: Bases of constant sources, by value, and base of an absent source.
CONSTANTS, ABSENT = {0.0: -1, float("-inf"): -2}, -3
#: Largest number of contiguous elements in a row that one Triton program reads.
WIDEST = 1024
_OUTER = 3


class Place(NamedTuple):
    """The place of a tensor in a buffer.

    Attributes:
        base: index of the buffer in the launch's list of buffers; a value of :data:`CONSTANTS` for a constant, and
            :data:`ABSENT` for no source.
        wide: whether the tensor has the accumulation dtype instead of the dtype of the inputs.
        offset: offset from the address of the buffer, in elements.
    """

    base: int
    wide: bool
    offset: int
    strides: tuple[int, ...]


class RowOperation(NamedTuple):
    """A copy, sum, fill or merge of tensors with the same shape.

    Attributes:
        into: tensors that are written. A merge writes an output and its lse. The lse has no channel dimension.
        sources: tensors that are read. Each source has as many tensors as ``into``.
    """

    shape: tuple[int, ...]
    into: tuple[Place, ...]
    sources: tuple[tuple[Place, ...], ...]


@dataclass(frozen=True)
class RowTable:
    """A table in device memory with the row operations of one launch: copies, fills, sums or merges.

    Attributes:
        values: table on the device, int64 ``[number, columns]``.
        rows: largest number of rows of an operation.
        width: largest number of elements of a row.
        sources: largest number of sources of an operation.
        wide: dtype of accumulators.
        aligned: whether rows of the outputs begin at multiples of eight elements.
    """

    values: Tensor
    rows: int
    width: int
    sources: int
    dtype: torch.dtype
    wide: torch.dtype
    aligned: bool


def make_table(
    operations: Sequence[RowOperation], dtype: torch.dtype, wide: torch.dtype, device: torch.device
) -> RowTable:
    """Return the table of row operations on ``device``. Either all operations are merges, or none is.

    The operations must not depend on each other, because one launch runs all of them.

    ``dtype`` is the dtype of the inputs, and ``wide`` the accumulation dtype.
    """
    sources = max((len(one.sources) for one in operations), default=1)
    entries = [entry for one in operations for entry in _entries(one)]
    absent = [Place(ABSENT, False, 0, (0,) * _OUTER)]
    table, aligned, most, widest = [], True, 0, 1
    for sizes, width, into, some in entries:
        missing = absent * len(into) * (sources - len(some))
        places = [*into, *(place for source in some for place in source), *missing]
        row = [prod(sizes), *sizes[1:], width]
        for place in places:
            row += [place.base, place.wide, place.offset, *place.strides]
        table.append(row)
        # The statistics of a merge have one number per row, so only the outputs decide about alignment.
        rows = places[:: len(into)]
        aligned &= not gcd(width, *(number for place in rows for number in (place.offset, *place.strides))) % 8
        most, widest = max(most, row[0]), max(widest, width)
    # The copy to the device is asynchronous.
    values = torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)
    return RowTable(values, most, widest, sources, dtype, wide, aligned)


_Entry = tuple[tuple[int, ...], int, list[Place], list[list[Place]]]


def _entries(one: RowOperation) -> Iterator[_Entry]:
    # Tuples of three outer sizes, elements per row, written tensors, and the tensors of each source.
    if 0 in one.shape:
        return
    if len(one.into) > 1:
        # The strides of rows, sequences and heads, without the stride of channels.
        rows = [[x._replace(strides=x.strides[:_OUTER]) for x in places] for places in (one.into, *one.sources)]
        yield one.shape[:-1], one.shape[-1], rows[0], rows[1:]
        return
    places = [one.into[0], *(place for (place,) in one.sources)]
    sizes, strides = _few(one.shape, [place.strides for place in places])
    width = sizes.pop()
    for steps in strides:
        steps.pop()
    extra = max(0, len(sizes) - _OUTER)
    for index in product(*map(range, sizes[:extra])):
        moved = [
            [place._replace(offset=place.offset + sumprod(index, steps[:extra]), strides=_padded(steps[extra:], 0))]
            for place, steps in zip(places, strides, strict=True)
        ]
        yield _padded(sizes[extra:], 1), width, moved[0], moved[1:]


def _few(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Flatten dimensions of equal-shaped tensors where strides allow it. Return the new sizes and strides."""
    dims = [(size, [one[axis] for one in strides]) for axis, size in enumerate(shape) if size > 1]
    if not dims or any(step != 1 for step in dims[-1][1]):
        dims.append((1, [1] * len(strides)))
    last = dims.pop()
    if last[0] > WIDEST:
        # A Triton program cannot read a longer row.
        width = max(one for one in range(1, WIDEST + 1) if last[0] % one == 0)
        dims.append((last[0] // width, [step * width for step in last[1]]))
        last = width, last[1]
    joined: list[tuple[int, list[int]]] = []
    for size, steps in dims:
        if joined and all(before == step * size for before, step in zip(joined[-1][1], steps, strict=True)):
            size *= joined.pop()[0]
        joined.append((size, steps))
    joined.append(last)
    return [size for size, _ in joined], [[steps[tensor] for _, steps in joined] for tensor in range(len(strides))]


def _padded(numbers: Sequence[int], by: int) -> tuple[int, ...]:
    return (*[by] * (_OUTER - len(numbers)), *numbers)
