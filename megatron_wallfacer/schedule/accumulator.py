"""Accumulators: rows to which partial results are added, and the parts that are still to be added.

Parts are collected until an operation reads the rows, or until the results of an attention call must be freed. Then one
launch adds all collected parts, and reads and writes each row of the accumulator once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from megatron_wallfacer.schedule.held import DEPTH
from megatron_wallfacer.schedule.ops import Op
from megatron_wallfacer.schedule.program import KernelRows, Operand
from megatron_wallfacer.schedule.rows import Range, Rows, moved

#: The same rows of each tensor of an accumulator.
Sources = tuple[Operand | KernelRows, ...]


class Part(NamedTuple):
    """Rows that are to be added to rows of an accumulator.

    Attributes:
        rows: half-open range of rows of the accumulator.
        sources: function from a range of these rows to the sources of the range, one source per tensor.
        slot: slot of the attention call that computes the sources; None if the sources are in memory.
        op: operation of the schedule that computes the sources.
    """

    rows: Range
    sources: Callable[[Range], Sources]
    slot: int | None = None
    op: Op | None = None


@dataclass(slots=True)
class Accumulator:
    """Rows to which partial results are added.

    Attributes:
        rows: memory of the rows.
        tokens: number of rows.
        written: boundaries of the row ranges that have been written, ascending: start, end, start, end, ...
        parts: parts that are still to be added, in this order.
    """

    rows: Rows
    tokens: int
    written: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    @property
    def is_deep(self) -> bool:
        """Return whether parts of the largest allowed number of operations have been collected."""
        return len({id(part.op) for part in self.parts if part.op is not None}) >= DEPTH

    def take(self) -> list[tuple[Range, bool, tuple[Part, ...]]]:
        """Remove all parts, and mark the rows of the parts as written.

        Returns:
            (row range, whether the rows had been written before, parts) for each range of rows with the same parts.
        """
        if not self.parts:
            return []
        around = min(part.rows[0] for part in self.parts), max(part.rows[1] for part in self.parts)
        found = [one for one in self._split(around, self.parts) if one[2]]
        for rows, _, _ in found:
            self._mark(rows)
        self.parts = []
        return found

    def hand_over(self, rows: Range, into: Accumulator, first: int, own: Callable[[Range], Sources]) -> None:
        """Move some rows and their parts to another accumulator, and mark the rows as written.

        No operation may read the rows afterwards.

        Args:
            rows: half-open range of rows, each of which has been written or has a part.
            into: accumulator that receives the rows as parts.
            first: row of ``into`` that corresponds to the first of the rows.
            own: function from a range of rows of this accumulator to their operands.
        """
        by = first - rows[0]
        for part in (*(Part(held, own) for held in self._held()), *self.parts):
            if both := _common(part.rows, rows):
                sources = part.sources
                into.parts.append(
                    part._replace(rows=moved(both, by), sources=lambda wanted, of=sources: of(moved(wanted, -by)))
                )
        self.parts = [left for part in self.parts for left in _without(part, rows)]
        self._mark(rows)

    def unwritten(self, rows: Range) -> list[Range]:
        """Mark some rows as written, and return the ranges that were not written before and have no part."""
        found = [part for part, held, parts in self._split(rows, self.parts) if not (held or parts)]
        for part in found:
            self._mark(part)
        return found

    def _held(self) -> Iterator[Range]:
        return zip(self.written[::2], self.written[1::2], strict=True)

    def _split(self, rows: Range, parts: list[Part]) -> list[tuple[Range, bool, tuple[Part, ...]]]:
        first, end = rows
        ends = {first, end, *self.written[bisect_right(self.written, first) : bisect_left(self.written, end)]}
        ends |= {one for part in parts for one in part.rows if first < one < end}
        found: list[tuple[Range, bool, tuple[Part, ...]]] = []
        for a, b in pairwise(sorted(ends)):
            here = bool(bisect_right(self.written, a) % 2), tuple(p for p in parts if p.rows[0] <= a < p.rows[1])
            if found and found[-1][1:] == here and found[-1][0][1] == a:
                a = found.pop()[0][0]
            found.append(((a, b), *here))
        return found

    def _mark(self, rows: Range) -> None:
        place = bisect_right(self.written, rows[0])
        if place % 2 and rows[1] <= self.written[place]:
            return
        ranges = sorted([*self._held(), rows])
        merged: list[int] = []
        for first, end in ranges:
            if merged and first <= merged[-1]:
                merged[-1] = max(merged[-1], end)
            else:
                merged += [first, end]
        self.written = merged


def _common(a: Range, b: Range) -> Range | None:
    first, end = max(a[0], b[0]), min(a[1], b[1])
    return (first, end) if first < end else None


def _without(part: Part, rows: Range) -> Iterator[Part]:
    """Yield the parts of a part before and after a range of rows."""
    for side in ((part.rows[0], min(part.rows[1], rows[0])), (max(part.rows[0], rows[1]), part.rows[1])):
        if side[0] < side[1]:
            yield part._replace(rows=side)
