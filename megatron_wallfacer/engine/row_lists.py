"""Row operations (copies, fills, sums, merges) on a GPU. One launch runs a list of them.

A table lists the operations of one launch. The first run of a pass creates the table. The table has indices of buffers
instead of addresses, so it is valid for every run of the pass. If kernels return results with other strides than
before, a new table is created.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine.memory import Memory
from megatron_wallfacer.engine.merge import kernels
from megatron_wallfacer.engine.row_table import BASES, CONSTANTS, Place, RowOperation, RowTable, make_table
from megatron_wallfacer.engine.transfers import Action
from megatron_wallfacer.schedule.program import Copy, Fill, KernelRows, Merge, Source, Sum

RowStep = Copy | Fill | Sum | Merge
#: Strides and dtype of a result of an attention call.
_Layout = tuple[tuple[int, ...], torch.dtype]
#: Operands that are written, and sources, each of which has as many operands or constants.
_Operation = tuple[tuple[int, ...], tuple[tuple[Source | float, ...], ...]]


def row_list(step: RowStep, memory: Memory, device: torch.device) -> Action:
    """Return the call that runs a list of copies, fills, sums or merges as one launch."""
    frees = memory.held(getattr(step, "frees", ()))
    lists = [_RowList(rows, memory, device) for rows in _within_bases(_rows(step), memory)]

    def run(x: list[Any], works: list[Any]) -> None:
        for one in lists:
            one.launch(x)
        for slot in frees:
            x[slot] = None

    return run


class _RowList:
    def __init__(self, rows: Sequence[_Operation], memory: Memory, device: torch.device) -> None:
        self._rows, self._memory, self._device = rows, memory, device
        self._buffers = list(dict.fromkeys(_buffers(rows, memory)))
        self._results = list(dict.fromkeys((one.slot, one.result) for one in _sources(rows, KernelRows)))
        self._slots = [(memory.slots + slot, number) for slot, number in self._results]
        self._merges = len(rows[0][0]) > 1
        self._run: Callable[[Sequence[Tensor]], None] | None = None
        self._layouts: list[_Layout] = []

    def launch(self, x: list[Any]) -> None:
        """Run all operations. ``x`` is the list of operands, slots and buffers that :class:`Memory` describes."""
        results = [x[slot][number] for slot, number in self._slots]
        layouts = [(result.stride(), result.dtype) for result in results]
        # The table is created in the first run, because a pass may be compiled while fake tensors trace a program.
        if self._run is None or layouts != self._layouts:
            self._run = kernels().RowLaunch(self._make(layouts), merges=self._merges)
            self._layouts = layouts
        self._run([*[x[number] for number in self._buffers], *results])

    def _make(self, layouts: Sequence[_Layout]) -> RowTable:
        found = dict(zip(self._results, layouts, strict=True))
        operations = []
        for into, sources in self._rows:
            written = tuple(self._place(one) for one in into)
            of = tuple(
                tuple(self._source(one, place, found) for one, place in zip(some, written, strict=True))
                for some in sources
            )
            operations.append(RowOperation(self._shape(into[0]), written, of))
        return make_table(operations, self._memory.dtype, self._memory.accumulation, self._device)

    def _shape(self, number: int) -> tuple[int, ...]:
        operand = self._memory.operands[number]
        return (operand.shape[0] // self._memory.dtype.itemsize,) if operand.view == "bytes" else operand.shape

    def _place(self, number: int) -> Place:
        operand = self._memory.operands[number]
        base = self._buffers.index(self._memory.buffers[operand.buffer])
        if operand.view == "bytes":
            return Place(base, False, operand.offset // self._memory.dtype.itemsize, operand.strides)
        return Place(base, self._memory.is_wide(operand), operand.offset, operand.strides)

    def _source(self, one: Source | float, like: Place, layouts: dict[tuple[int, int], _Layout]) -> Place:
        if isinstance(one, float):
            return Place(CONSTANTS[one], like.wide, 0, like.strides)
        if isinstance(one, int):
            return self._place(one)
        key = one.slot, one.result
        strides, dtype = layouts[key]
        first = one.rows[0] * strides[0] if one.rows else 0
        is_wide = dtype == self._memory.accumulation
        return Place(len(self._buffers) + self._results.index(key), is_wide, first, strides)


def _rows(step: RowStep) -> list[_Operation]:
    match step:
        case Copy(pairs=pairs):
            return [((into,), ((source,),)) for into, source in pairs]
        case Fill(rows=rows):
            return [((into,), ((value,),)) for into, value in rows]
        case Sum(rows=rows):
            return [((into,), tuple((one,) for one in sources)) for into, sources in rows]
        case Merge(rows=rows):
            return list(rows)


def _within_bases(rows: Sequence[_Operation], memory: Memory) -> Iterator[list[_Operation]]:
    """Yield the operations in as few lists as possible, each with at most as many buffers as a kernel accepts."""
    part: list[_Operation] = []
    for row in rows:
        if part and _bases([*part, row], memory) > BASES:
            yield part
            part = []
        part.append(row)
    yield part


def _bases(rows: Sequence[_Operation], memory: Memory) -> int:
    results = {(one.slot, one.result) for one in _sources(rows, KernelRows)}
    return len({*_buffers(rows, memory)}) + len(results)


def _buffers(rows: Sequence[_Operation], memory: Memory) -> Iterator[int]:
    for number in (*(one for into, _ in rows for one in into), *_sources(rows, int)):
        yield memory.buffers[memory.operands[number].buffer]


def _sources(rows: Sequence[_Operation], kind: type) -> Iterator[Any]:
    return (one for _, sources in rows for some in sources for one in some if isinstance(one, kind))
