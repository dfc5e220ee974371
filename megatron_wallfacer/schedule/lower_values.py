"""The state of lowering: where values are in memory, and which partial results are not yet added to accumulators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megatron_wallfacer.schedule import ops, program
from megatron_wallfacer.schedule.accumulator import Accumulator, Part, Sources
from megatron_wallfacer.schedule.copies import STRIDED, Pair, permutation, strided
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.lifetimes import LocalPart, aliases, local_part_key, local_parts
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.places import Places
from megatron_wallfacer.schedule.program import KernelRows, Operand, ProgramStep, Source
from megatron_wallfacer.schedule.rows import Range, Rows, common_rows, cut, moved, placed_rows

_EMPTY = {"lse": float("-inf")}
_PARTIAL_OUT = frozenset(ops.PARTIAL_OUT)


class Values:
    """Values and accumulators of a pass during lowering.

    Attributes:
        rows: place in memory of each value that is not an accumulator, by name.
        aliases: map from the result of a :class:`Concat` with a single source to this source, by name.
        slots: largest number of attention calls with pending results at the same time.
    """

    def __init__(self, schedule: Schedule, places: Places) -> None:
        self.schedule, self.places = schedule, places
        self.aliases = aliases(schedule)
        self.rows: dict[str, Rows] = {}
        self.accumulators: dict[str, Accumulator] = {}
        self.slots = 0
        self._pending: list[Accumulator] = []
        self._local_parts = {(part.reader, part.source): part for part in local_parts(schedule)}

    # --- reading ---

    def read(self, name: str) -> tuple[Rows, tuple[ProgramStep, ...]]:
        """Return the rows of a value, and the steps that must run before the rows are read."""
        name = self.aliases.get(name, name)
        if name not in self.accumulators:
            return self.rows[name], ()
        total = self.accumulators[name]
        finalized = self.finalize([total]) if total.parts else ()
        return total.rows, (*finalized, *self.fill(total, (0, total.tokens)))

    def read_part(self, reader: int, name: str) -> tuple[Rows, tuple[ProgramStep, ...]]:
        """Return the rows of ``name`` that ``reader`` reads: all rows, or those that a head exchange does not send."""
        part = self._local_parts.get((reader, name))
        return self.read(name) if part is None else (self.local_part(part, "received"), ())

    def is_exchanged(self, reader: int, name: str) -> bool:
        """Return whether ``reader`` reads only the rows of ``name`` that stayed on this rank in a head exchange."""
        return (reader, name) in self._local_parts

    def local_part(self, part: LocalPart, end: str) -> Rows:
        """Return the rows that stay on this rank in a head exchange. ``end`` selects their buffer."""
        mine = shard_chunks(self.schedule.rank, self.schedule.cp_size)
        return self.places.placed(part.source, local_part_key(part.start, end), mine)

    def tensors(self, names: Iterable[str]) -> dict[str, Operand]:
        """Return a map from tensor name to operand, for several values. The values must have the same rows."""
        return {
            tensor: operand
            for name in names
            for tensor, operand in self.rows[self.aliases.get(name, name)].tensors.items()
        }

    def fill(self, total: Accumulator, rows: Range) -> tuple[ProgramStep, ...]:
        """Return the step that fills rows without any partial result: lse with -inf, other tensors with 0."""
        empty = [
            (self.places.number(cut(operand, some)), _EMPTY.get(tensor, 0.0))
            for some in total.unwritten(rows)
            for tensor, operand in total.rows.tensors.items()
        ]
        return (program.Fill(tuple(empty)),) if empty else ()

    # --- accumulating ---

    def accumulator_of(self, name: str) -> Accumulator:
        """Return the accumulator called ``name``, which is created if it is missing."""
        if name not in self.accumulators:
            self.accumulators[name] = self.accumulator(self.places.buffer(name))
        return self.accumulators[name]

    def accumulator(self, rows: Rows) -> Accumulator:
        """Return a new accumulator at the given place in memory."""
        return Accumulator(rows, len(rows.chunks) * self.places.chunk)

    def free_slot(self) -> int:
        """Return a free slot for the results of an attention call."""
        used = self._used()
        slot = next(slot for slot in range(self.slots + 1) if slot not in used)
        self.slots = max(self.slots, slot + 1)
        return slot

    def _used(self) -> set[int | None]:
        return {part.slot for total in self._pending for part in total.parts}

    def add_results(
        self, op: ops.Attend, total: Accumulator, block: Sequence[int], rows: Range, slot: int, first: int
    ) -> None:
        """Make :meth:`finalize` add the results of an attention call to an accumulator.

        The results are in the slot ``slot``, and those for this accumulator begin at index ``first``. ``block`` has the
        chunk ids of a block. The call has computed the range ``rows`` of the block's token rows.
        """
        for here, there in placed_rows(rows, block, total.rows.chunks, self.places.chunk):

            def some(wanted: Range, by: int = here[0] - there[0] - rows[0]) -> Sources:
                within = moved(wanted, by)
                result_rows = None if within == (0, rows[1] - rows[0]) else within
                return tuple(KernelRows(slot, first + number, result_rows) for number in range(len(total.rows.tensors)))

            self._add(total, Part(there, some, slot, op))

    def add_rows(self, total: Accumulator, rows: Range, source: Rows, first: int) -> None:
        """Make :meth:`finalize` add rows of ``source``, beginning with row ``first``, to ``rows`` of ``total``."""
        operands = _in_order(source)
        self._add(total, Part(rows, lambda wanted: _cut_all(operands, moved(wanted, first - rows[0]))))

    def _add(self, total: Accumulator, part: Part) -> None:
        self._note(total)
        total.parts.append(part)

    def hand_over(self, total: Accumulator, rows: Range, into: Accumulator, first: int) -> None:
        """Make :meth:`finalize` add ``rows`` of ``total`` to ``into``. No later operation may read ``rows``."""
        self._note(into)
        operands = _in_order(total.rows)
        total.hand_over(rows, into, first, lambda wanted: _cut_all(operands, wanted))

    def _note(self, total: Accumulator) -> None:
        if not any(one is total for one in self._pending):
            self._pending.append(total)

    def finalize(self, totals: Sequence[Accumulator] | None = None) -> tuple[ProgramStep, ...]:
        """Return steps that add the collected partial results to ``totals``, by default to all accumulators."""
        totals = [total for total in self._pending if totals is None or any(total is one for one in totals)]
        rows: list[tuple[Sources, tuple[Sources, ...]]] = []
        used = self._used()
        for total in totals:
            operands = _in_order(total.rows)
            for some, held, parts in total.take():
                into = _cut_all(operands, some)
                rows.append((into, (*((into,) if held else ()), *(part.sources(some) for part in parts))))
        frees = tuple(sorted(slot for slot in used - self._used() if slot is not None))
        self._pending = [total for total in self._pending if total.parts]
        if not rows:
            return ()
        if all(len(of) == 1 and isinstance(of[0][0], Operand) for _, of in rows):
            return tuple(self.copy([pair for into, (source,) in rows for pair in zip(into, source, strict=True)]))
        if self.schedule.backward:
            by_tensor = ((to, of) for into, sources in rows for to, *of in zip(into, *sources, strict=True))
            sums = tuple((self._number(to), self._numbers(of)) for to, of in by_tensor)
            return (program.Sum(sums, frees),)
        return (program.Merge(tuple((self._numbers(into), tuple(map(self._numbers, of))) for into, of in rows), frees),)

    def _numbers(self, sources: Sequence[Operand | KernelRows]) -> tuple[Source, ...]:
        return tuple(map(self._number, sources))

    def _number(self, source: Operand | KernelRows) -> Source:
        return source if isinstance(source, KernelRows) else self.places.number(source)

    # --- copying ---

    def row_pairs(self, source: Rows, into: Rows, chunks: Iterable[int]) -> list[Pair]:
        """Return pairs (destination operand, source operand) that cover ``chunks``."""
        return [
            (cut(into.tensors[tensor], self.places.rows(here)), cut(operand, self.places.rows(there)))
            for there, here in common_rows(source.chunks, into.chunks, chunks)
            for tensor, operand in source.tensors.items()
        ]

    def copy(self, pairs: Sequence[Pair]) -> Iterator[ProgramStep]:
        """Yield a step that does all copies. The step is a list of strided copies, or a permutation of equal blocks."""
        few = strided(pairs)
        if len(few) > STRIDED and (found := permutation(pairs, self.places.itemsize, self.places.wide)):
            yield program.Permute(self.places.number(found.into), self.places.number(found.source), found.index)
        elif few:
            yield program.Copy(self.places.numbers_of(few))


def _in_order(rows: Rows) -> tuple[Operand, ...]:
    names = ops.PARTIAL_OUT if _PARTIAL_OUT.issuperset(rows.tensors) else tuple(sorted(rows.tensors))
    return tuple(rows.tensors[name] for name in names)


def _cut_all(operands: tuple[Operand, ...], rows: Range) -> tuple[Operand, ...]:
    return tuple(cut(operand, rows) for operand in operands)
