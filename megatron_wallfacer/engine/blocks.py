"""Blocks: the tensors that a value of a schedule stands for, and the one buffer in which they travel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_wallfacer.kernels.protocol import accumulation_dtype
from megatron_wallfacer.schedule.heads import part_heads
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK, runs
from megatron_wallfacer.schedule.ops import Schedule, Value
from megatron_wallfacer.schedule.volume import ACCUMULATED, KV_TENSORS, STATISTICS, Shape


@dataclass
class Block:
    """Rows of some tensors.

    Attributes:
        tensors: by name, each ``[rows, batch, heads, channels]``, statistics ``[rows, batch, heads]``.
        chunks: which chunks of the sequence the rows are.
        packet: the bytes of all tensors, if they lie in one buffer.
    """

    tensors: dict[str, Tensor]
    chunks: tuple[int, ...]
    packet: Tensor | None = None


@dataclass(frozen=True)
class Sizes:
    """Sizes and dtypes of the tensors of one call.

    Attributes:
        chunk: tokens of a chunk.
        batch: sequences.
        q_heads, kv_heads: of the rank's own tensors.
        head_dim, v_head_dim: channels.
        parts: parts of the heads.
        dtype: of the inputs.
        device: of all.
    """

    chunk: int
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    parts: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, like: Tensor, kv_heads: int, head_dim: int, v_head_dim: int, parts: int) -> Sizes:
        """Sizes, from the rank's own queries or output, sbhd, and what these do not tell."""
        tokens, batch, q_heads, _ = like.shape
        heads = q_heads, kv_heads, head_dim, v_head_dim
        return cls(tokens // CHUNKS_PER_RANK, batch, *heads, parts, like.dtype, like.device)

    @property
    def shard(self) -> Shape:
        """The rank's own tensors, as the counters want to know them."""
        return Shape(
            tokens=CHUNKS_PER_RANK * self.chunk,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            batch=self.batch,
            itemsize=self.dtype.itemsize,
            accumulate_itemsize=accumulation_dtype(self.dtype).itemsize,
        )

    def heads(self, tensor: str, part: int) -> slice:
        """Where the heads of a part stand among all of a tensor's."""
        q_heads, kv_heads = part_heads(part, self.parts, self.q_heads, self.kv_heads)
        heads = kv_heads if tensor in KV_TENSORS else q_heads
        return slice(heads.start, heads.stop)

    def dtype_of(self, tensor: str) -> torch.dtype:
        """Results and statistics are in the accumulation dtype."""
        return accumulation_dtype(self.dtype) if tensor in ACCUMULATED else self.dtype

    def shape_of(self, tensor: str, chunks: int, heads: int) -> tuple[int, ...]:
        """Of some chunks and heads of a tensor."""
        rows = (chunks * self.chunk, self.batch, heads)
        if tensor in STATISTICS:
            return rows
        return (*rows, self.v_head_dim if tensor in ("v", "dv", "out", "dout") else self.head_dim)

    def empty(self, payload: Sequence[str], chunks: Sequence[int], part: int) -> Block:
        """A block whose tensors lie in one buffer, values undefined."""
        return self._in_one_buffer(payload, chunks, part, None)

    def unpack(self, value: Value, packet: Tensor) -> Block:
        """A value's block whose tensors lie in this buffer."""
        return self._in_one_buffer(value.payload, value.chunks, value.part, packet)

    def _in_one_buffer(self, payload: Sequence[str], chunks: Sequence[int], part: int, packet: Tensor | None) -> Block:
        shapes, sizes = {}, {}
        # The wider dtype first: what follows is then aligned, whatever the sizes.
        for tensor in sorted(payload, key=lambda name: -self.dtype_of(name).itemsize):
            heads = self.heads(tensor, part)
            shapes[tensor] = self.shape_of(tensor, len(chunks), heads.stop - heads.start)
            sizes[tensor] = torch.Size(shapes[tensor]).numel() * self.dtype_of(tensor).itemsize
        if packet is None:
            packet = torch.empty(sum(sizes.values()), dtype=torch.uint8, device=self.device)
        pieces = packet.split(list(sizes.values()))
        tensors = {
            name: piece.view(self.dtype_of(name)).view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)
        }
        return Block(tensors, tuple(chunks), packet)

    def like(self, value: Value) -> Block:
        """An empty block for a value."""
        return self.empty(value.payload, value.chunks, value.part)

    def rows(self, chunks: tuple[int, int]) -> slice:
        """Token rows of a range of chunks."""
        return slice(chunks[0] * self.chunk, chunks[1] * self.chunk)

    def copy_rows(self, source: Block, into: Block, chunks: Iterable[int], payload: Iterable[str]) -> None:
        """Copy some chunks from one block to another; both have them."""
        for chunk_from, chunk_to in self.common(source, into, chunks):
            for tensor in payload:
                into.tensors[tensor][self.rows(chunk_to)].copy_(source.tensors[tensor][self.rows(chunk_from)])

    def common(
        self, source: Block, into: Block, chunks: Iterable[int]
    ) -> Iterable[tuple[tuple[int, int], tuple[int, int]]]:
        """Ranges of chunks, in each of two blocks, that hold the same rows, as long as they come."""
        here = {chunk: index for index, chunk in enumerate(into.chunks)}
        for first, end in runs(tuple(chunks), source.chunks):
            rows = [here[chunk] for chunk in source.chunks[first:end]]
            start = 0
            for index in range(1, len(rows) + 1):
                if index == len(rows) or rows[index] != rows[index - 1] + 1:
                    yield (first + start, first + index), (rows[start], rows[index - 1] + 1)
                    start = index


def select(block: Block, payload: Sequence[str]) -> Block:
    """Some of a block's tensors; all of them stay in their buffer."""
    if set(payload) == set(block.tensors):
        return block
    return Block({name: block.tensors[name] for name in payload}, block.chunks)


def loaded(schedule: Schedule, name: str, sizes: Sizes, local: Mapping[str, Tensor]) -> Block:
    """Some heads of the rank's own tensors, as views."""
    value = schedule.values[name]
    tensors = {tensor: local[tensor][:, :, sizes.heads(tensor, value.part)] for tensor in value.payload}
    return Block(tensors, value.chunks)
