"""Runs a schedule: one operation after the other, waiting only for what the next one reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_wallfacer.engine import masked
from megatron_wallfacer.engine.blocks import Block, Sizes, loaded
from megatron_wallfacer.engine.merge import surrogate_output
from megatron_wallfacer.engine.sums import Sum
from megatron_wallfacer.engine.timeline import Pass, Recorder, nothing
from megatron_wallfacer.engine.transfers import Expected, Pending, Transfers
from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel
from megatron_wallfacer.schedule import ops
from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK, runs, shard_chunks
from megatron_wallfacer.schedule.mask import CAUSAL, Mask
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.tiles import Tile
from megatron_wallfacer.schedule.volume import KV_TENSORS, STATISTICS


@dataclass(frozen=True)
class Runtime:
    """Transfers of this rank's groups, the kernel, the softmax scale, who looks on, and the cap of logits, if any."""

    transfers: Transfers
    kernel: Kernel
    scale: float
    recorder: Recorder = nothing
    softcap: float = 0.0

    @property
    def spec(self) -> AttnSpec:
        """Scale and softcap of each kernel call."""
        return AttnSpec(self.scale, self.softcap)


def run(
    schedule: Schedule,
    runtime: Runtime,
    sizes: Sizes,
    local: Mapping[str, Tensor],
    given: Mapping[str, Block],
    mask: Mask = CAUSAL,
    *,
    rounded: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Block]]:
    """One pass on this rank. Collective over the grid's groups.

    Args:
        schedule: this rank's.
        runtime: transfers, kernel, scale.
        sizes: of the tensors.
        local: the rank's own tensors, sbhd, all heads: ``q k v``, in backward ``dout lse delta`` too.
        given: what forward kept, by name.
        mask: what is live in tiles that the schedule calls masked.
        rounded: results that are complete when they are stored may be so in the dtype of the inputs.

    Returns:
        The results, ``out lse`` or ``dq dk dv``, all heads, in the accumulation dtype but for what is rounded; and what
        is kept for backward.
    """
    with runtime.recorder(Pass(schedule, sizes.shard)):
        return _Pass(schedule, runtime, sizes, local, given, mask, rounded).run()


class _Pass:
    """The state of one run: values by name, moves on their way, results."""

    def __init__(
        self,
        schedule: Schedule,
        runtime: Runtime,
        sizes: Sizes,
        local: Mapping[str, Tensor],
        given: Mapping[str, Block],
        mask: Mask,
        rounded: bool,
    ) -> None:
        self._schedule, self._runtime, self._sizes, self._local = schedule, runtime, sizes, local
        self._mask, self._rounded = mask, rounded
        self._blocks: dict[str, Block] = dict(given)
        self._sums: dict[str, Sum] = {}
        self._coming: dict[str, tuple[ops.Move, Pending]] = {}
        self._leaving: list[tuple[ops.Move, Pending]] = []
        self._expected: dict[int, Expected | None] = {}
        self._stand_ins: dict[tuple[str, ...], Tensor] = {}
        self._results: dict[str, Tensor] = {}
        self._stored: set[tuple[str, int]] = set()

    def run(self) -> tuple[dict[str, Tensor], dict[str, Block]]:
        record, drops = self._runtime.recorder, self._schedule.drops
        for index, op in enumerate(self._schedule.ops):
            self._await(record, ops.reads(op))
            with record(op):
                self._do[type(op)](self, op)
            for name in drops.get(index, ()):
                self._forget(name)
        for move, pending in self._leaving:
            with record(move):
                pending.wait()
        return self._results, {name: self._blocks[name] for name in self._schedule.keeps}

    def _await(self, record: Recorder, names: Iterable[str]) -> None:
        for name in names:
            if name in self._coming:
                move, pending = self._coming[name]
                with record(move):
                    arrived = pending.wait()
                self._blocks |= arrived
                for arrival in arrived:
                    del self._coming[arrival]

    def _read(self, name: str) -> Block:
        return self._sums[name].settle() if name in self._sums else self._blocks[name]

    def _forget(self, name: str) -> None:
        self._blocks.pop(name, None)
        self._sums.pop(name, None)
        for names in [names for names in self._stand_ins if name in names]:
            del self._stand_ins[names]

    def _load(self, op: ops.Load) -> None:
        self._blocks[op.into] = loaded(self._schedule, op.into, self._sizes, self._local)

    def _assemble(self, op: ops.Assemble) -> None:
        value, sources = self._schedule.values[op.into], [self._read(name) for name in op.sources]
        if len(sources) == 1:
            self._blocks[op.into] = sources[0]
            return
        whole = self._sizes.like(value)
        for source in sources:
            self._sizes.copy_rows(source, whole, source.chunks, value.payload)
        self._blocks[op.into] = whole

    def _expect(self, op: ops.Expect) -> None:
        self._expected[id(op.move)] = self._runtime.transfers.expect(op.move, self._schedule.values, self._sizes)

    def _start(self, op: ops.Start) -> None:
        blocks = {message.value: self._read(message.value) for message in op.move.sends}
        expected = self._expected.pop(id(op.move), None)
        pending = self._runtime.transfers.start(op.move, blocks, self._schedule.values, self._sizes, expected)
        self._coming |= {message.value: (op.move, pending) for message in op.move.receives}
        if not op.move.receives:
            # Nobody reads what it brings: it is waited for at the end.
            self._leaving.append((op.move, pending))
        for name in blocks:
            if self._schedule.last_copies.get(name) is op:
                self._blocks[name].packet = None

    def _attend(self, op: ops.Attend) -> None:
        (self._attend_backward if self._schedule.backward else self._attend_forward)(op)

    def _attend_forward(self, op: ops.Attend) -> None:
        q, kv, into = self._tensors(op.q), self._tensors(op.kv), self._sum(op.q_into)
        kernel, spec = self._runtime.kernel, self._runtime.spec
        for tile in op.tiles:
            rows, cols = self._sizes.rows(tile.rows), self._sizes.rows(tile.cols)
            tensors = q["q"][rows], kv["k"][cols], kv["v"][cols]
            if tile.masked:
                out, lse = masked.forward(kernel, *tensors, self._calls(op, tile), spec)
            else:
                out, lse = kernel.forward(*tensors, _whole(rows, cols, tile), spec)
            into.add(tile.rows, {"out": out, "lse": lse})
            del out, lse

    def _attend_backward(self, op: ops.Attend) -> None:
        q, kv, stand_in = self._tensors(op.q), self._tensors(op.kv), self._stand_in(op.q)
        q_into, kv_into = self._sum(op.q_into), self._sum(op.kv_into)
        kernel, spec = self._runtime.kernel, self._runtime.spec
        for tile in op.tiles:
            rows, cols = self._sizes.rows(tile.rows), self._sizes.rows(tile.cols)
            tensors = {name: q[name][rows] for name in ("dout", "q", "lse")} | {"out": stand_in[rows]}
            tensors |= {name: kv[name][cols] for name in ("k", "v")}
            if tile.masked:
                dq, dk, dv = masked.backward(kernel, tensors, self._calls(op, tile), spec)
            else:
                ordered = (tensors[name] for name in ("dout", "q", "k", "v", "out", "lse"))
                dq, dk, dv = kernel.backward(*ordered, _whole(rows, cols, tile), spec)
            q_into.add(tile.rows, {"dq": dq})
            kv_into.add(tile.cols, {"dk": dk, "dv": dv})
            del dq, dk, dv

    def _calls(self, op: ops.Attend, tile: Tile) -> tuple[AttnTile, ...]:
        q_chunks, k_chunks = (self._schedule.values[names[0]].chunks for names in (op.q, op.kv))
        rows, cols = q_chunks[slice(*tile.rows)], k_chunks[slice(*tile.cols)]
        packed = self._runtime.kernel.capabilities.varlen and self._sizes.batch == 1
        return masked.calls_of(self._mask, rows, cols, self._schedule.cp_size, self._sizes.chunk, packed)

    def _tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {tensor: rows for name in names for tensor, rows in self._read(name).tensors.items()}

    def _stand_in(self, names: tuple[str, ...]) -> Tensor:
        if names not in self._stand_ins:
            tensors = self._tensors(names)
            self._stand_ins[names] = surrogate_output(tensors["dout"], tensors["delta"])
        return self._stand_ins[names]

    def _sum(self, name: str) -> Sum:
        if name not in self._sums:
            self._sums[name] = Sum(self._sizes.like(self._schedule.values[name]), self._sizes)
        return self._sums[name]

    def _fold(self, op: ops.Fold) -> None:
        source, into = self._read(op.source), self._sum(op.into)
        both = sorted(set(source.chunks) & set(into.block.chunks))
        for there, here in self._sizes.common(source, into.block, both):
            rows = self._sizes.rows(there)
            into.add(here, {name: tensor[rows] for name, tensor in source.tensors.items()})

    def _store(self, op: ops.Store) -> None:
        block, part = self._read(op.source), self._schedule.values[op.source].part
        mine = runs(shard_chunks(self._schedule.rank, self._schedule.cp_size), block.chunks)
        for tensor, rows in block.tensors.items():
            heads = self._sizes.heads(tensor, part)
            # Parts that share kv heads have the same heads.
            again = (tensor, heads.start) in self._stored
            self._stored.add((tensor, heads.start))
            parts = self._result(tensor)[:, :, heads].split([(end - first) * self._sizes.chunk for first, end in mine])
            for total, chunks in zip(parts, mine, strict=True):
                part_rows = rows[self._sizes.rows(chunks)]
                total.add_(part_rows) if again else total.copy_(part_rows)

    def _result(self, tensor: str) -> Tensor:
        if tensor not in self._results:
            heads = self._sizes.kv_heads if tensor in ops.DKV else self._sizes.q_heads
            shape = self._sizes.shape_of(tensor, CHUNKS_PER_RANK, heads)
            # Parts that share kv heads are added up here.
            complete = tensor not in KV_TENSORS or self._sizes.parts <= heads
            rounded = self._rounded and complete and tensor not in STATISTICS
            dtype = self._sizes.dtype if rounded else self._sizes.dtype_of(tensor)
            self._results[tensor] = torch.empty(shape, dtype=dtype, device=self._sizes.device)
        return self._results[tensor]

    _do: ClassVar[dict[type, Callable[[_Pass, ops.Op], None]]] = {
        ops.Load: _load,
        ops.Assemble: _assemble,
        ops.Expect: _expect,
        ops.Start: _start,
        ops.Attend: _attend,
        ops.Fold: _fold,
        ops.Store: _store,
    }


def _whole(rows: slice, cols: slice, tile: Tile) -> AttnTile:
    """Return a tile in tokens that is full or causal."""
    return AttnTile((rows.start, rows.stop), (cols.start, cols.stop), tile.causal)
