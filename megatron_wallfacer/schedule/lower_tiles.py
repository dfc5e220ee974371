"""Lowering of attention: the kernel calls of each operation, and the steps that accumulate their results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from megatron_wallfacer.schedule import ops
from megatron_wallfacer.schedule.accumulator import Accumulator
from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.batches import joined_calls
from megatron_wallfacer.schedule.held import holds_results
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.lifetimes import local_views, proxy_key
from megatron_wallfacer.schedule.lower_values import Values
from megatron_wallfacer.schedule.mask import Mask
from megatron_wallfacer.schedule.program import WORKSPACE, AttendBackward, AttendForward, Operand, OutProxy, ProgramStep
from megatron_wallfacer.schedule.rows import Range, contiguous, cut, cut_heads, moved
from megatron_wallfacer.schedule.tiles import Tile

#: Largest number of calls for parts of a tile whose results are accumulated together.
TOGETHER = 16


class TileLowering:
    """Lowering of attention operations to kernel calls."""

    def __init__(self, values: Values, mask: Mask, *, varlen: bool) -> None:
        self.values, self.places, self.schedule = values, values.places, values.schedule
        self.mask, self.varlen = mask, varlen
        self.views = local_views(self.schedule)
        self.proxies: dict[tuple[str, ...], Operand] = {}

    def attend(self, op: ops.Attend) -> Iterator[ProgramStep]:
        """Return the calls of an operation, and the steps that accumulate their results."""
        return self._backward(op) if self.schedule.backward else self._forward(op)

    def _forward(self, op: ops.Attend) -> Iterator[ProgramStep]:
        q, kv, total = self.values.tensors(op.q), self.values.tensors(op.kv), self.values.accumulator_of(op.q_into)
        yield from self._finalize_deep(total)
        number = self.places.number
        for tile, held in self._tiles(op):
            slot = self.values.free_slot()
            yield AttendForward(
                number(cut(q["q"], tile.rows)),
                number(cut(kv["k"], tile.cols)),
                number(cut(kv["v"], tile.cols)),
                tile,
                slot,
            )
            self.values.add_results(op, total, self._chunks(op.q), tile.rows, slot, 0)
            yield from () if held else self.values.finalize()

    def _backward(self, op: ops.Attend) -> Iterator[ProgramStep]:
        q, kv = self.values.tensors(op.q), self.values.tensors(op.kv)
        assert op.kv_into is not None
        q_total, kv_total = self.values.accumulator_of(op.q_into), self.values.accumulator_of(op.kv_into)
        yield from self._finalize_deep(q_total, kv_total)
        out, made = self._out(op.q, q)
        yield from made
        q = q | {"out": out}
        for tile, held in self._tiles(op):
            rows = {name: self.places.number(cut(q[name], tile.rows)) for name in ("dout", "q", "out", "lse")}
            cols = {name: self.places.number(cut(kv[name], tile.cols)) for name in ("k", "v")}
            slot = self.values.free_slot()
            yield AttendBackward(**rows, **cols, tile=tile, slot=slot)
            self.values.add_results(op, q_total, self._chunks(op.q), tile.rows, slot, 0)
            self.values.add_results(op, kv_total, self._chunks(op.kv), tile.cols, slot, 1)
            yield from () if held else self.values.finalize()

    def _finalize_deep(self, *totals: Accumulator) -> tuple[ProgramStep, ...]:
        deep = [total for total in totals if total.is_deep]
        return self.values.finalize(deep) if deep else ()

    def _out(self, names: tuple[str, ...], q: Mapping[str, Operand]) -> tuple[Operand, tuple[ProgramStep, ...]]:
        """Return O if all queries are local. Otherwise return ``out_proxy``, and the step that computes it."""
        if self.views.issuperset(names):
            shape = self.places.shape_of("out", CHUNKS_PER_RANK, None)
            whole = Operand("out", "own", shape, self.places.strides["out"], 0)
            return cut_heads(whole, self.places.heads("out", self.schedule.values[names[0]].head_slice)), ()
        if names in self.proxies:
            return self.proxies[names], ()
        shape = q["dout"].shape
        offset = self.places.layout.offsets[proxy_key(names)] // self.places.shape.itemsize
        proxy = self.proxies[names] = Operand(WORKSPACE, "input", shape, contiguous(shape), offset)
        return proxy, (OutProxy(*map(self.places.number, (q["dout"], q["delta"], proxy))),)

    def _tiles(self, op: ops.Attend) -> Iterator[tuple[AttnTile, bool]]:
        """Yield all kernel calls, and whether the results of a call are accumulated with those of the next call."""
        hold = holds_results(self.places.shape)
        for tile in op.tiles:
            rows, cols = self.places.rows(tile.rows), self.places.rows(tile.cols)
            if tile.partial:
                yield from _together(self._calls(op, tile), rows, cols)
            else:
                yield AttnTile(rows, cols, causal=tile.causal), hold

    def _calls(self, op: ops.Attend, tile: Tile) -> tuple[AttnTile, ...]:
        blocks = self._chunks(op.q)[slice(*tile.rows)], self._chunks(op.kv)[slice(*tile.cols)]
        sizes = self.schedule.cp_size, self.places.chunk
        if self.varlen and self.places.shape.batch == 1:
            return joined_calls(self.mask, *blocks, *sizes)
        return self.mask.calls(*blocks, *sizes)

    def _chunks(self, names: Sequence[str]) -> tuple[int, ...]:
        return self.schedule.values[names[0]].chunks


def _together(calls: Sequence[AttnTile], rows: Range, cols: Range) -> Iterator[tuple[AttnTile, bool]]:
    # Results that are accumulated together must not be larger than the results of the whole tile.
    number, height, width = 0, 0, 0
    for call, following in zip_longest(calls, calls[1:]):
        call_rows, call_cols, *kind = call
        number, height, width = number + 1, height + call.height, width + call.width
        held = (
            following is not None
            and number < TOGETHER
            and height + following.height <= rows[1] - rows[0]
            and width + following.width <= cols[1] - cols[0]
        )
        if not held:
            number, height, width = 0, 0, 0
        yield AttnTile(moved(call_rows, rows[0]), moved(call_cols, cols[0]), *kind), held
