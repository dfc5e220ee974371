"""Attention results before their accumulation: how many bytes they take, and when they are accumulated.

A launch that adds several results to an accumulator reads and writes the accumulator only once. Results are therefore
kept until an operation reads their rows. At most two operations per accumulator may have results that are not yet
accumulated. With large shards, results are accumulated immediately.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

from megatron_wallfacer.schedule.ops import Accumulate, Attend, Op, Schedule, SendRecv, WriteResult, is_last_accumulate
from megatron_wallfacer.schedule.volume import Shape, rows_bytes

#: Largest number of operations whose results for one accumulator are held at the same time.
DEPTH = 2
#: Bytes of a query shard from which on results are accumulated at once, to save memory. The launches of an accumulation
#: are then short compared with an attention call.
LARGE = 2**28


def holds_results(shape: Shape) -> bool:
    """Return whether results of attention calls may be kept for later, instead of accumulated immediately."""
    return shape.bytes("q") < LARGE


@dataclass(frozen=True, slots=True)
class _Part:
    """Results of one tile for one accumulator. ``chunks`` are the chunks that are not yet accumulated."""

    tile: int
    op: int
    chunks: set[int]


@dataclass(slots=True)
class _Held:
    """Results that are not yet accumulated (``parts``, by accumulator), and bytes of results (``sizes``, by tile)."""

    parts: dict[str, list[_Part]] = field(default_factory=dict)
    sizes: list[float] = field(default_factory=list)
    most: float = 0.0

    def note(self) -> None:
        tiles = {part.tile for parts in self.parts.values() for part in parts}
        self.most = max(self.most, sum(self.sizes[tile] for tile in tiles))

    def is_deep(self, name: str) -> bool:
        """Return whether partial results of :data:`DEPTH` operations wait to be added to an accumulator."""
        return len({part.op for part in self.parts.get(name, ())}) >= DEPTH

    def take(self, name: str, chunks: tuple[int, ...]) -> bool:
        """Accumulate some rows, and return whether the accumulator had any results to add."""
        before = self.parts.get(name, [])
        for part in before:
            part.chunks.difference_update(chunks)
        self.parts[name] = [part for part in before if part.chunks]
        return bool(before)


def held_bytes(schedule: Schedule, shape: Shape, aliases: Mapping[str, str]) -> int:
    """Return the peak bytes of attention results that are not yet accumulated. The results of a running call count too.

    ``aliases`` come from :func:`megatron_wallfacer.schedule.lifetimes.aliases`.
    """
    held = _Held()
    for _ in _accumulated(schedule, shape, aliases, held):
        pass
    return int(held.most)


def accumulations(schedule: Schedule, shape: Shape, aliases: Mapping[str, str]) -> Counter[int]:
    """Return the number of launches that accumulate results, by index of the operation.

    The several attention calls of a partial tile count as one call.
    """
    return Counter(_accumulated(schedule, shape, aliases, _Held()))


def _accumulated(schedule: Schedule, shape: Shape, aliases: Mapping[str, str], held: _Held) -> Iterator[int]:
    for index, op in enumerate(schedule.ops):
        if isinstance(op, Attend):
            yield from _attend(index, op, schedule, shape, held)
            continue
        taken = [held.take(aliases.get(name, name), chunks) for name, chunks in _reads(index, op, schedule)]
        if any(taken) or is_last_accumulate(schedule, index) or isinstance(op, WriteResult):
            yield index


def _attend(index: int, op: Attend, schedule: Schedule, shape: Shape, held: _Held) -> Iterator[int]:
    into = [name for name in (op.q_into, op.kv_into) if name is not None]
    deep = [name for name in into if held.is_deep(name)]
    for name in deep:
        held.take(name, schedule.values[name].chunks)
    if deep:
        yield index
    # Results of a kernel have the dtype and the sizes of its inputs. Statistics have the accumulation dtype.
    by_row, by_col = (("q",), ("k", "v")) if schedule.backward else (("dout", "lse"), ())
    for tile in op.tiles:
        sides = (by_row, tile.rows), (by_col, tile.cols)
        held.sizes.append(sum(rows_bytes(schedule, shape, tensors, end - first) for tensors, (first, end) in sides))
        for name, block, rows in zip(into, (op.q, op.kv), (tile.rows, tile.cols), strict=False):
            chunks = set(schedule.values[block[0]].chunks[slice(*rows)])
            held.parts.setdefault(name, []).append(_Part(len(held.sizes) - 1, index, chunks))
        held.note()
        if tile.partial or not holds_results(shape):
            # The results of several calls for parts of a tile are no larger than the results of the whole tile.
            held.parts.clear()
            yield index


def _reads(index: int, op: Op, schedule: Schedule) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the rows that an operation reads, as (name of the value, chunk ids)."""
    match op:
        case SendRecv(transfer=transfer):
            yield from ((message.value, message.chunks) for message in transfer.sends)
        case WriteResult(sources=sources):
            yield from ((name, schedule.values[name].chunks) for name in sources)
        case Accumulate(source=source):
            yield source, schedule.values[source].chunks
            if is_last_accumulate(schedule, index):
                together = takewhile(lambda one: isinstance(one, Accumulate), reversed(schedule.ops[: index + 1]))
                yield from ((one.into, schedule.values[one.into].chunks) for one in together)
