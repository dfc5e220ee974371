"""Where the rows of each value of a pass are: what the parts of lowering share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megatron_wallfacer.schedule import ops
from megatron_wallfacer.schedule.accumulator import Accumulator, Part, Sources
from megatron_wallfacer.schedule.copies import STRIDED, Pair, permutation, strided
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.memory import OwnPart, aliases, own_key, own_parts
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.places import Places
from megatron_wallfacer.schedule.program import Copy, Fill, KernelRows, Merge, Operand, Permute, Source, Step, Sum
from megatron_wallfacer.schedule.rows import Range, Rows, common_rows, cut, moved, placed_rows

_EMPTY = {"lse": float("-inf")}
_PARTIAL_OUT = frozenset(ops.PARTIAL_OUT)


class Values:
    """Values and accumulators of a pass, while it is lowered.

    Args:
        schedule: the pass.
        places: its memory.

    Attributes:
        rows: by name, rows that are not summed here.
        sums: accumulators by name.
        aliases: by name, the value whose buffer it shares.
        slots: attention calls whose results wait to be accumulated, at most.
    """

    def __init__(self, schedule: Schedule, places: Places) -> None:
        self.schedule, self.places = schedule, places
        self.aliases = aliases(schedule)
        self.rows: dict[str, Rows] = {}
        self.sums: dict[str, Accumulator] = {}
        self.slots = 0
        self._pending: list[Accumulator] = []
        self._own_parts = {(part.reader, part.source): part for part in own_parts(schedule)}

    # --- reading ---

    def read(self, name: str) -> tuple[Rows, tuple[Step, ...]]:
        """A value that is complete now, and the steps that make it so: rows that nothing has reached are filled."""
        name = self.aliases.get(name, name)
        if name not in self.sums:
            return self.rows[name], ()
        total = self.sums[name]
        settled = self.settle([total]) if total.parts else ()
        return total.rows, (*settled, *self.fill(total, (0, total.tokens)))

    def read_part(self, reader: int, name: str) -> tuple[Rows, tuple[Step, ...]]:
        """What an operation reads of a value: of the source of a head exchange, the part that stays on the rank."""
        part = self._own_parts.get((reader, name))
        return self.read(name) if part is None else (self.own_part(part, "received"), ())

    def is_exchanged(self, reader: int, name: str) -> bool:
        """Whether an operation reads only the part of a value that stays on the rank."""
        return (reader, name) in self._own_parts

    def own_part(self, part: OwnPart, end: str) -> Rows:
        """Rows of the rank's own part of a head exchange, among those sent or received."""
        mine = shard_chunks(self.schedule.rank, self.schedule.cp_size)
        return self.places.placed(part.source, own_key(part.start, end), mine)

    def tensors(self, names: Iterable[str]) -> dict[str, Operand]:
        """Tensors of values that have the same rows. Tiles read inputs only, so nothing need be filled."""
        return {
            tensor: operand
            for name in names
            for tensor, operand in self.rows[self.aliases.get(name, name)].tensors.items()
        }

    def fill(self, total: Accumulator, rows: Range) -> tuple[Step, ...]:
        """Steps that fill those of some rows that nothing has reached."""
        empty = [
            (self.places.number(cut(operand, some)), _EMPTY.get(tensor, 0.0))
            for some in total.unwritten(rows)
            for tensor, operand in total.rows.tensors.items()
        ]
        return (Fill(tuple(empty)),) if empty else ()

    # --- accumulating ---

    def sum(self, name: str) -> Accumulator:
        """The accumulator of this name."""
        if name not in self.sums:
            self.sums[name] = self.accumulator(self.places.buffer(name))
        return self.sums[name]

    def accumulator(self, rows: Rows) -> Accumulator:
        """An accumulator in some memory."""
        return Accumulator(rows, len(rows.chunks) * self.places.chunk)

    def free_slot(self) -> int:
        """A slot for the results of an attention call."""
        used = self._used()
        slot = next(slot for slot in range(self.slots + 1) if slot not in used)
        self.slots = max(self.slots, slot + 1)
        return slot

    def _used(self) -> set[int | None]:
        return {part.slot for total in self._pending for part in total.parts}

    def add_results(
        self, op: ops.Attend, total: Accumulator, block: Sequence[int], rows: Range, slot: int, first: int
    ) -> None:
        """Hold an attention call's results for some rows of an accumulator until :meth:`settle`.

        Args:
            op: the operation.
            total: the accumulator, which has all rows of the block, or more.
            block: chunk ids of the block.
            rows: half-open range of the block's rows.
            slot: of the call.
            first: index of the first of its tensors among the call's results.
        """

        for here, there in placed_rows(rows, block, total.rows.chunks, self.places.chunk):

            def some(wanted: Range, by: int = here[0] - there[0] - rows[0]) -> Sources:
                within = moved(wanted, by)
                result_rows = None if within == (0, rows[1] - rows[0]) else within
                return tuple(KernelRows(slot, first + number, result_rows) for number in range(len(total.rows.tensors)))

            self.add(total, Part(there, some, slot, op))

    def add_rows(self, total: Accumulator, rows: Range, source: Rows, first: int) -> None:
        """Have rows of a value, from row ``first`` on, added to rows of an accumulator by :meth:`settle`."""
        operands = _in_order(source)
        self.add(total, Part(rows, lambda wanted: _cut_all(operands, moved(wanted, first - rows[0]))))

    def add(self, total: Accumulator, part: Part) -> None:
        """Have a part added to an accumulator by :meth:`settle`."""
        self._note(total)
        total.parts.append(part)

    def pass_on(self, total: Accumulator, rows: Range, into: Accumulator, first: int) -> None:
        """Have some rows of an accumulator added to rows of another, from ``first`` on. Nothing reads them again."""
        self._note(into)
        operands = _in_order(total.rows)
        total.pass_on(rows, into, first, lambda wanted: _cut_all(operands, wanted))

    def _note(self, total: Accumulator) -> None:
        if not any(one is total for one in self._pending):
            self._pending.append(total)

    def settle(self, totals: Sequence[Accumulator] | None = None) -> tuple[Step, ...]:
        """Add the parts of some accumulators, or of all, in one step."""
        totals = [total for total in self._pending if totals is None or any(total is one for one in totals)]
        rows: list[tuple[Sources, tuple[Sources, ...]]] = []
        used = self._used()
        for total in totals:
            operands = _in_order(total.rows)
            for some, held, parts in total.take():
                into = _cut_all(operands, some)
                rows.append((into, (*((into,) if held else ()), *(part.cut(some) for part in parts))))
        frees = tuple(sorted(slot for slot in used - self._used() if slot is not None))
        self._pending = [total for total in self._pending if total.parts]
        if not rows:
            return ()
        if all(len(of) == 1 and isinstance(of[0][0], Operand) for _, of in rows):
            return tuple(self.copy([pair for into, (source,) in rows for pair in zip(into, source, strict=True)]))
        if self.schedule.backward:
            one_by_one = ((to, of) for into, sources in rows for to, *of in zip(into, *sources, strict=True))
            return (Sum(tuple((self._number(to), tuple(map(self._number, of))) for to, of in one_by_one), frees),)
        return (Merge(tuple((self._numbers(into), tuple(map(self._numbers, of))) for into, of in rows), frees),)

    def _numbers(self, sources: Sources) -> tuple[Source, ...]:
        return tuple(map(self._number, sources))

    def _number(self, source: Operand | KernelRows) -> Source:
        return source if isinstance(source, KernelRows) else self.places.number(source)

    # --- copying ---

    def row_pairs(self, source: Rows, into: Rows, chunks: Iterable[int]) -> list[Pair]:
        """(into, source) of some chunks that both have."""
        return [
            (cut(into.tensors[tensor], self.places.rows(here)), cut(operand, self.places.rows(there)))
            for there, here in common_rows(source.chunks, into.chunks, chunks)
            for tensor, operand in source.tensors.items()
        ]

    def copy(self, pairs: Sequence[Pair]) -> Iterator[Step]:
        """One step for some copies: strided pairs where they are few, else a permutation where they are one."""
        few = strided(pairs)
        if len(few) > STRIDED and (found := permutation(pairs, self.places.itemsize, self.places.wide)):
            yield Permute(self.places.number(found.into), self.places.number(found.source), found.index)
        elif few:
            yield Copy(self.places.numbers_of(few))


def _in_order(rows: Rows) -> tuple[Operand, ...]:
    """Tensors in the order of a kernel's results."""
    names = ops.PARTIAL_OUT if _PARTIAL_OUT.issuperset(rows.tensors) else tuple(sorted(rows.tensors))
    return tuple(rows.tensors[name] for name in names)


def _cut_all(operands: tuple[Operand, ...], rows: Range) -> tuple[Operand, ...]:
    return tuple(cut(operand, rows) for operand in operands)
