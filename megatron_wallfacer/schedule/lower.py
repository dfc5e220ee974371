"""Lowering assigns a memory offset to every value of a schedule, and a list of steps to every operation.

Lowering records which rows of an accumulator have been written. Steps that accumulate results therefore read only rows
that have been written. Rows that get no partial result are filled with constants before they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_wallfacer.schedule import ops
from megatron_wallfacer.schedule.accumulator import Accumulator
from megatron_wallfacer.schedule.copies import Pair
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.lower_tiles import TileLowering
from megatron_wallfacer.schedule.lower_transfers import TransferLowering
from megatron_wallfacer.schedule.lower_values import Values
from megatron_wallfacer.schedule.mask import Mask
from megatron_wallfacer.schedule.memory import result_tensors
from megatron_wallfacer.schedule.ops import Op, Schedule, Transfer
from megatron_wallfacer.schedule.places import Places
from megatron_wallfacer.schedule.program import PostReceives, Program, ProgramStep
from megatron_wallfacer.schedule.rows import Rows, common_rows, cut_heads
from megatron_wallfacer.schedule.volume import Shape, value_bytes

#: An operation or the wait for a transfer, with its steps.
Labelled = tuple[Op | Transfer, tuple[ProgramStep, ...]]


def lower(
    schedule: Schedule,
    shape: Shape,
    mask: Mask,
    strides: Mapping[str, tuple[int, ...]],
    *,
    varlen: bool,
    sinks: bool = False,
    all_to_all: bool = False,
) -> Program:
    """Return the program of one pass.

    Args:
        schedule: schedule of one rank.
        shape: sizes of the shard of the rank.
        mask: mask of the whole sequence, from which the kernel calls of partial tiles are derived.
        strides: strides of the local tensors by name: q, k, v in forward; dout, out, lse, delta in backward. If the
            grid has no head axis, backward also needs the strides of q, k, v. Tensors are
            ``[tokens / P, batch, heads, channels]``, and the statistics lse and delta ``[tokens / P, batch, heads]``.
        varlen: whether the kernel accepts several documents in one call.
        sinks: whether sinks are merged into the output after the pass. With sinks the pass returns the output in the
            accumulation dtype.
        all_to_all: whether each head exchange is one all-to-all, which the backend must support.
    """
    values = Values(schedule, Places(schedule, shape, strides, sinks=sinks))
    tiles, transfers = TileLowering(values, mask, varlen=varlen), TransferLowering(values, all_to_all=all_to_all)
    return _Lowering(values, tiles, transfers).run()


class _Lowering:
    def __init__(self, values: Values, tiles: TileLowering, transfers: TransferLowering) -> None:
        self.schedule, self.places = values.schedule, values.places
        self.values, self.tiles, self.transfers = values, tiles, transfers
        self.results = {tensor: self.places.result(tensor) for tensor in result_tensors(self.schedule)}
        self.stored: dict[tuple[str, int], Accumulator] = {}
        self.accumulating: list[Accumulator] = []
        self.steps: list[Labelled] = []

    def run(self) -> Program:
        schedule = self.schedule
        for name in schedule.given:
            self.values.rows[name] = self.places.packed(name, name, 0)
        for index, op in enumerate(schedule.ops):
            self.steps += self.transfers.wait(ops.reads(op))
            self.steps.append((op, tuple(self._steps(index, op))))
        self.steps += self.transfers.wait_for_the_rest()
        return Program(
            schedule=schedule,
            shape=self.places.shape,
            inputs=tuple(self.places.strides),
            given=schedule.given,
            results=tuple(self.results.values()),
            kept=tuple((name, value_bytes(schedule, self.places.shape, name)) for name in schedule.keeps),
            workspace_bytes=self.places.layout.nbytes,
            operands=self.places.operands,
            slots=self.values.slots,
            transfers=tuple(self.transfers.made),
            steps=tuple(self.steps),
            received=self.transfers.received(),
        )

    def _steps(self, index: int, op: Op) -> Iterator[ProgramStep]:
        match op:
            case ops.View(into=name):
                self.values.rows[name] = self.places.own(name)
            case ops.Concat(into=name, sources=sources):
                yield from self._concat(index, name, sources)
            case ops.PostRecv(transfer=transfer):
                yield PostReceives(self.transfers.number_of(transfer))
            case ops.SendRecv(transfer=transfer):
                yield from self.transfers.send_recv(index, transfer)
            case ops.Attend():
                yield from self.tiles.attend(op)
            case ops.Accumulate(source=source, into=into):
                yield from self._accumulate(index, source, into)
            case ops.WriteResult(sources=sources):
                yield from self._store(index, sources)

    def _concat(self, index: int, name: str, sources: Sequence[str]) -> Iterator[ProgramStep]:
        if name in self.values.aliases:
            return
        whole = self.values.rows[name] = self.places.buffer(name)
        pairs: list[Pair] = []
        for source in sources:
            rows, steps = self.values.read_part(index, source)
            yield from steps
            pairs += self.values.row_pairs(rows, whole, rows.chunks)
        yield from self.values.copy(pairs)

    def _accumulate(self, index: int, source: str, into: str) -> Iterator[ProgramStep]:
        """Collect rows of ``source`` for ``into``. The last of consecutive ``Accumulate`` operations adds all rows."""
        rows, steps = self.values.read(source)
        yield from steps
        total = self.values.accumulator_of(into)
        self.accumulating.append(total)
        both = sorted(set(rows.chunks) & set(total.rows.chunks))
        for there, here in common_rows(rows.chunks, total.rows.chunks, both):
            self.values.add_rows(total, self.places.rows(here), rows, self.places.rows(there)[0])
        if ops.is_last_accumulate(self.schedule, index):
            yield from self.values.finalize(self.accumulating)
            self.accumulating = []

    def _store(self, index: int, sources: Sequence[str]) -> Iterator[ProgramStep]:
        mine = shard_chunks(self.schedule.rank, self.schedule.cp_size)
        for source in sources:
            name = self.values.aliases.get(source, source)
            result = self._result(name)
            total = None if self.values.is_exchanged(index, source) else self.values.accumulators.get(name)
            rows = total.rows if total is not None else self.values.read_part(index, source)[0]
            for there, here in common_rows(rows.chunks, mine, mine):
                some, first = self.places.rows(there), self.places.rows(here)[0]
                if total is None:
                    self.values.add_rows(result, self.places.rows(here), rows, some[0])
                else:
                    yield from self.values.fill(total, some)
                    self.values.hand_over(total, some, result, first)
        yield from self.values.finalize(list(self.stored.values()))

    def _result(self, name: str) -> Accumulator:
        value = self.schedule.values[name]
        tensors = {
            tensor: cut_heads(self.places.whole(self.results[tensor]), self.places.heads(tensor, value.head_slice))
            for tensor in value.payload
        }
        key = value.payload[0], self.places.heads(value.payload[0], value.head_slice).start
        if key not in self.stored:
            mine = shard_chunks(self.schedule.rank, self.schedule.cp_size)
            self.stored[key] = self.values.accumulator(Rows(tensors, mine))
        return self.stored[key]
