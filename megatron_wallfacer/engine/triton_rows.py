"""Row operations on a GPU: one launch of a Triton kernel performs a whole list of operations.

A row of the table describes one copy, sum or merge: its sizes, and the buffer, dtype, offset and strides of each tensor
(:mod:`megatron_wallfacer.engine.row_table`). A Triton program computes a block of rows of one operation. Exactly one
program reads and writes each element, without atomics, so results repeat bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_wallfacer.engine.row_table import BASES, Place, RowOperation, RowTable, make_table
from megatron_wallfacer.engine.triton_launch import Launch

#: Rows per Triton program.
_ROWS = 8
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}
_ADDRESSES = tuple(f"a{number}" for number in range(BASES))


class RowLaunch:
    """A Triton launch that runs all operations of a table. Either all operations are merges, or none is."""

    def __init__(self, table: RowTable, *, merges: bool) -> None:
        kernel, grid = (_merge if merges else _sum), (triton.cdiv(table.rows, _ROWS), len(table.values))
        self._table, self._is_empty = table.values, 0 in grid
        self._may_align = table.aligned
        self._launches = [Launch(kernel, grid) for _ in (False, True)]
        width = triton.next_power_of_2(table.width)
        self._constants = table.sources, _ROWS, width, _DTYPES[table.dtype], _DTYPES[table.wide]

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Launch all operations of the table. ``tensors`` are its buffers in order, at most :data:`BASES`."""
        if self._is_empty:
            return
        addresses = [x.data_ptr() for x in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        aligned = self._may_align and bits % 16 == 0
        unused = addresses[:1] * (BASES - len(addresses))
        self._launches[aligned].run(self._table, *addresses, *unused, *self._constants, aligned)


def merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """See :func:`megatron_wallfacer.engine.merge.merge_into`."""
    tensors = out, lse, part_out, part_lse
    strides = tuple(x.stride() for x in tensors)
    _one_merge(tuple(out.shape), strides, part_out.dtype, out.dtype, out.device)(tensors)


@lru_cache(maxsize=16)
def _one_merge(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    wide: torch.dtype,
    device: torch.device,
) -> RowLaunch:
    is_wide = True, True, dtype == wide, True
    out, lse, part_out, part_lse = (Place(base, is_wide[base], 0, some) for base, some in enumerate(strides))
    operation = RowOperation(shape, (out, lse), ((out, lse), (part_out, part_lse)))
    return RowLaunch(make_table([operation], dtype, wide, device), merges=True)


@triton.jit
def _address(base, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15):
    low = _one_of_eight(base, a0, a1, a2, a3, a4, a5, a6, a7)
    return tl.where(base < 8, low, _one_of_eight(base - 8, a8, a9, a10, a11, a12, a13, a14, a15))


@triton.jit
def _one_of_eight(base, a0, a1, a2, a3, a4, a5, a6, a7):
    low = tl.where(base < 2, tl.where(base < 1, a0, a1), tl.where(base < 3, a2, a3))
    high = tl.where(base < 6, tl.where(base < 5, a4, a5), tl.where(base < 7, a6, a7))
    return tl.where(base < 4, low, high)


@triton.jit
def _row_offsets(place, index, middle, inner):
    pair = index // inner
    outer = (pair // middle) * tl.load(place + 3)
    return tl.load(place + 2) + outer + (pair % middle) * tl.load(place + 4) + (index % inner) * tl.load(place + 5)


@triton.jit
def _width(entry, ALIGNED: tl.constexpr):
    width = tl.load(entry + 3)
    return tl.multiple_of(width, 8) if ALIGNED else width


@triton.jit
def _elements(address, rows, column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    first = address.to(tl.pointer_type(DTYPE)) + rows
    # Triton cannot infer the alignment of offsets from a table. The hint allows loads of 16 bytes.
    return (tl.multiple_of(first, 16) if ALIGNED else first)[:, None] + column


@triton.jit
def _load(address, is_wide, rows, column, inside, NARROW: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """Load elements in the input dtype or in the accumulation dtype, and convert them to the accumulation dtype."""
    narrow = tl.load(_elements(address, rows, column, NARROW, ALIGNED), inside & (is_wide == 0), 0.0)
    wide = tl.load(_elements(address, rows, column, WIDE, ALIGNED), inside & (is_wide != 0), 0.0)
    return tl.where(is_wide != 0, wide, narrow.to(WIDE))


@triton.jit
def _store(
    address, is_wide, rows, column, inside, value, NARROW: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr
):
    tl.store(_elements(address, rows, column, NARROW, ALIGNED), value.to(NARROW), inside & (is_wide == 0))
    tl.store(_elements(address, rows, column, WIDE, ALIGNED), value, inside & (is_wide != 0))


@triton.jit(do_not_specialize=_ADDRESSES)
def _sum(
    table, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,
    SOURCES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    entry = table + tl.program_id(1) * (4 + 6 * (SOURCES + 1))
    total, middle, inner = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    width = _width(entry, ALIGNED)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    inside = (index < total)[:, None] & (column < width)
    result = tl.full((ROWS, WIDTH), 0.0, WIDE)
    for source in tl.static_range(SOURCES):
        place = entry + 10 + 6 * source
        base = tl.load(place)
        address = _address(base, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15)
        rows = _row_offsets(place, index, middle, inner)
        value = _load(address, tl.load(place + 1), rows, column, inside & (base >= 0), NARROW, WIDE, ALIGNED)
        # An absent source leaves the sum unchanged, including the sign of a zero.
        if source == 0:
            result = tl.where(base == -2, float("-inf"), value)
        else:
            result = tl.where(base >= 0, result + value, result)
    place = entry + 4
    address = _address(tl.load(place), a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15)
    rows = _row_offsets(place, index, middle, inner)
    _store(address, tl.load(place + 1), rows, column, inside, result, NARROW, WIDE, ALIGNED)


@triton.jit(do_not_specialize=_ADDRESSES)
def _merge(
    table, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,
    SOURCES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    entry = table + tl.program_id(1) * (4 + 12 * (SOURCES + 1))
    total, middle, inner = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    width = _width(entry, ALIGNED)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    live = index < total
    inside = live[:, None] & (column < width)
    out, lse = tl.full((ROWS, WIDTH), 0.0, WIDE), tl.full((ROWS,), float("-inf"), WIDE)
    for source in tl.static_range(SOURCES):
        place = entry + 16 + 12 * source
        base = tl.load(place)
        rows = _row_offsets(place, index, middle, inner)
        address = _address(base, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15)
        part = _load(address, tl.load(place + 1), rows, column, inside & (base >= 0), NARROW, WIDE, ALIGNED)
        statistics = _address(tl.load(place + 6), a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15)
        statistics = statistics.to(tl.pointer_type(WIDE))
        at = statistics + _row_offsets(place + 6, index, middle, inner)
        new = tl.load(at, live & (base >= 0), float("-inf"))
        if source == 0:
            out, lse = part, new
        else:
            largest = tl.maximum(lse, new)
            # For rows without a key both weights are zero instead of NaN.
            low = tl.where(largest == float("-inf"), 0.0, largest)
            merged = low + tl.log(tl.exp(lse - low) + tl.exp(new - low))
            weight = tl.exp(new - tl.where(merged == float("-inf"), 0.0, merged))[:, None]
            apart = part - out
            # Interpolation starts from the nearer end, like torch.lerp, so that weights 0 and 1 are exact.
            between = tl.where(weight < 0.5, out + weight * apart, out + apart - apart * (1.0 - weight))
            out, lse = tl.where(base >= 0, between, out), tl.where(base >= 0, merged, lse)
    place = entry + 4
    rows = _row_offsets(place, index, middle, inner)
    address = _address(tl.load(place), a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15)
    _store(address, tl.load(place + 1), rows, column, inside, out, NARROW, WIDE, ALIGNED)
    statistics = _address(tl.load(place + 6), a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15)
    statistics = statistics.to(tl.pointer_type(WIDE))
    tl.store(statistics + _row_offsets(place + 6, index, middle, inner), lse, live)
