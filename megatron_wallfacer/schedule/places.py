"""Assign memory to the values of a schedule. An operand is a numbered, strided tensor in a buffer."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from math import prod

from megatron_wallfacer.schedule.copies import Pair
from megatron_wallfacer.schedule.heads import slice_heads
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.lifetimes import value_key
from megatron_wallfacer.schedule.memory import kept_buffers, result_is_wide, workspace
from megatron_wallfacer.schedule.ops import ACCUMULATED, KV_TENSORS, STATISTICS, Schedule
from megatron_wallfacer.schedule.program import WORKSPACE, Operand, Result
from megatron_wallfacer.schedule.rows import Range, Rows, contiguous, cut_heads
from megatron_wallfacer.schedule.volume import Shape


class Places:
    """Memory locations of all values of a pass.

    Attributes:
        chunk: number of tokens in a chunk.
        wide: bytes of an element in the accumulation dtype.
        layout: offset of each buffer in the workspace.
    """

    def __init__(
        self, schedule: Schedule, shape: Shape, strides: Mapping[str, tuple[int, ...]], *, sinks: bool
    ) -> None:
        self.schedule, self.shape, self.strides, self._sinks = schedule, shape, strides, sinks
        self.chunk, self.wide = shape.tokens // CHUNKS_PER_RANK, shape.accumulate_itemsize
        self.layout = workspace(schedule, shape)
        self._kept = kept_buffers(schedule)
        self._numbers: dict[Operand, int] = {}

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Return the operands of the program by index."""
        return tuple(self._numbers)

    def own(self, name: str) -> Rows:
        """Return the rows of a :class:`View`: all local rows, but only some heads."""
        value = self.schedule.values[name]
        tensors = {}
        for tensor in value.payload:
            shape = self.shape_of(tensor, CHUNKS_PER_RANK, None)
            whole = Operand(tensor, "own", shape, self.strides[tensor], 0)
            tensors[tensor] = cut_heads(whole, self.heads(tensor, value.head_slice))
        return Rows(tensors, value.chunks)

    def buffer(self, name: str) -> Rows:
        """Place a value in its own buffer. The buffer is in the workspace, or is kept for backward."""
        key = value_key(name)
        if key in self._kept:
            return self.packed(name, self._kept[key], 0)
        return self.placed(name, key)

    def placed(self, name: str, key: Hashable, chunks: tuple[int, ...] | None = None) -> Rows:
        """Place the tensors of a value in the workspace buffer with the given key."""
        return self.packed(name, WORKSPACE, self.layout.offsets[key], chunks)

    def packed(self, name: str, buffer: str, offset: int, chunks: tuple[int, ...] | None = None) -> Rows:
        """Place all tensors of a :class:`Value` one after another in a buffer, from byte ``offset`` on.

        Tensors of the wider dtype come first, so that every tensor is aligned to the size of its elements. If
        ``chunks`` is given, the tensors have only the rows of these chunks.
        """
        value = self.schedule.values[name]
        chunks = value.chunks if chunks is None else chunks
        tensors, at = {}, offset
        for tensor in sorted(value.payload, key=lambda one: -self.shape.itemsize_of(one)):
            shape = self.shape_of(tensor, len(chunks), value.head_slice)
            size, view = self.shape.itemsize_of(tensor), "wide" if tensor in ACCUMULATED else "input"
            tensors[tensor] = Operand(buffer, view, shape, contiguous(shape), at // size)
            at += size * prod(shape)
        return Rows(tensors, chunks, Operand(buffer, "bytes", (at - offset,), (1,), offset))

    def result(self, tensor: str) -> Result:
        """Return the shape and the dtype of a result."""
        wide = result_is_wide(self.schedule, self.shape, tensor, sinks=self._sinks)
        return Result(tensor, self.shape_of(tensor, CHUNKS_PER_RANK, None), wide)

    def whole(self, result: Result) -> Operand:
        """Return an operand that covers a whole result tensor."""
        return Operand(result.name, "own", result.shape, contiguous(result.shape), 0)

    def shape_of(self, tensor: str, chunks: int, head_slice: int | None) -> tuple[int, ...]:
        """Return the shape of a tensor with ``chunks`` chunks of tokens, for one head slice or (None) for all heads."""
        shape = self.shape
        rows = (chunks * self.chunk, shape.batch, len(self.heads(tensor, head_slice)))
        if tensor in STATISTICS:
            return rows
        v_head_dim = shape.v_head_dim or shape.head_dim
        return (*rows, v_head_dim if tensor in ("v", "dv", "out", "dout") else shape.head_dim)

    def heads(self, tensor: str, head_slice: int | None) -> range:
        """Return the heads of a tensor that a head slice contains; all heads if ``head_slice`` is None."""
        slices = (0, 1) if head_slice is None else (head_slice, self.schedule.head_slices)
        q_heads, kv_heads = slice_heads(*slices, self.shape.q_heads, self.shape.kv_heads)
        return kv_heads if tensor in KV_TENSORS else q_heads

    def rows(self, chunks: Range) -> Range:
        """Return the token rows of a range of chunks."""
        return chunks[0] * self.chunk, chunks[1] * self.chunk

    def number(self, operand: Operand) -> int:
        """Return the index of an operand in the program. Equal operands have the same index."""
        return self._numbers.setdefault(operand, len(self._numbers))

    def numbers_of(self, pairs: Iterable[Pair]) -> tuple[tuple[int, int], ...]:
        """Return the indices, in the program's list of operands, of each pair (target, source)."""
        return tuple((self.number(into), self.number(source)) for into, source in pairs)

    def itemsize(self, operand: Operand) -> int:
        """Return the bytes of an element of an operand in the workspace."""
        sizes = {"input": self.shape.itemsize, "wide": self.shape.accumulate_itemsize, "bytes": 1}
        return sizes[operand.view]
