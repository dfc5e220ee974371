"""Accumulators: rows to which partial results are added.

Partial results are collected until an operation reads rows of the accumulator, or until the memory of a partial result
must be freed. Then one launch adds all collected results, and reads and writes each row of the accumulator once.
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
    """A partial result that is to be added to rows of an accumulator.

    Attributes:
        rows: half-open range of rows of the accumulator.
        sources: function that returns the partial result for a range of accumulator rows. The partial result is a tuple
            with one element per tensor of the accumulator.
        slot: slot with the results of an attention call; None if the partial result is in a buffer.
        op: attention operation that computes the partial result; None if the partial result is in a buffer.
    """

    rows: Range
    sources: Callable[[Range], Sources]
    slot: int | None = None
    op: Op | None = None


@dataclass(slots=True)
class Accumulator:
    """Rows to which partial results are added.

    Attributes:
        written: boundaries of the row ranges that have been written, ascending: start, end, start, end, ...
        parts: partial results that are not yet added, in the order of their addition.
    """

    rows: Rows
    tokens: int
    written: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    @property
    def is_deep(self) -> bool:
        """Return whether :data:`DEPTH` attention operations, or more, have results that are not yet added."""
        return len({id(part.op) for part in self.parts if part.op is not None}) >= DEPTH

    def take(self) -> list[tuple[Range, bool, tuple[Part, ...]]]:
        """Remove and return all partial results, and mark their rows as written.

        Returns:
            Tuples (range of rows, whether these rows were written before, partial results to be added to the rows).
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
        """Move a range of rows, with their partial results, to another accumulator.

        Every row of the range must have a result. The row is already written, or has a partial result that is not yet
        added. No later operation may read the range from this accumulator.

        Args:
            rows: half-open range of rows.
            into: accumulator that adds the rows later.
            first: row of ``into`` where the range begins.
            own: function that returns the operands, one per tensor, of a range of rows that is written in this
                accumulator.
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
        """Return the ranges within ``rows`` that have no partial result, and mark only these ranges as written."""
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
    for side in ((part.rows[0], min(part.rows[1], rows[0])), (max(part.rows[0], rows[1]), part.rows[1])):
        if side[0] < side[1]:
            yield part._replace(rows=side)
