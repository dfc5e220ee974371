"""Results of attention calls that are held: how many bytes they take, and when they are accumulated.

An accumulator is read and written once for all parts that are added to it together. So results of calls are held until
something reads their rows, or until a third operation adds to the same accumulator. Those of large calls are not held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

from megatron_wallfacer.schedule.ops import Attend, Fold, Op, Schedule, Start, Store, is_last_fold
from megatron_wallfacer.schedule.volume import Shape, rows_bytes

#: Operations whose results for one accumulator are held at the same time, at most.
DEPTH = 2
#: Bytes of a shard of queries whose calls are so long that launches beside them take no time, but held results memory.
LARGE = 2**28


def holds_results(shape: Shape) -> bool:
    """Return whether results are held at all, rather than accumulated after each call.

    Args:
        shape: sizes of the rank's shard.
    """
    return shape.bytes("q") < LARGE


@dataclass(frozen=True, slots=True)
class _Part:
    """Results of one tile for one accumulator: the tile by number, its operation, and the rows that are left."""

    tile: int
    op: int
    chunks: set[int]


@dataclass(slots=True)
class _Held:
    """Results that are held.

    Attributes:
        parts: by accumulator.
        sizes: bytes by tile.
        most: most bytes of tiles so far of which some results are held.
    """

    parts: dict[str, list[_Part]] = field(default_factory=dict)
    sizes: list[float] = field(default_factory=list)
    most: float = 0.0

    def note(self) -> None:
        """Take note of what is held now."""
        tiles = {part.tile for parts in self.parts.values() for part in parts}
        self.most = max(self.most, sum(self.sizes[tile] for tile in tiles))

    def is_deep(self, name: str) -> bool:
        """Whether an accumulator must be settled before another operation adds to it."""
        return len({part.op for part in self.parts.get(name, ())}) >= DEPTH

    def take(self, name: str, chunks: tuple[int, ...]) -> bool:
        """Accumulate some rows; whether there was anything to do."""
        before = self.parts.get(name, [])
        for part in before:
            part.chunks.difference_update(chunks)
        left = [part for part in before if part.chunks]
        if left:
            self.parts[name] = left
        else:
            self.parts.pop(name, None)
        return bool(before)


def held_bytes(schedule: Schedule, shape: Shape, aliases: Mapping[str, str]) -> int:
    """Return the most bytes that results of calls take: of one that runs, and held ones.

    Args:
        schedule: the pass of one rank.
        shape: sizes of the rank's shard.
        aliases: by value, the one whose buffer it shares.
    """
    held = _Held()
    for _ in _accumulated(schedule, shape, aliases, held):
        pass
    return int(held.most)


def accumulations(schedule: Schedule, shape: Shape, aliases: Mapping[str, str]) -> Counter[int]:
    """Return the launches that accumulate results, by index of the operation; a partial tile is taken as one call.

    Args:
        schedule: the pass of one rank.
        shape: sizes of the rank's shard.
        aliases: by value, the one whose buffer it shares.
    """
    return Counter(_accumulated(schedule, shape, aliases, _Held()))


def _accumulated(schedule: Schedule, shape: Shape, aliases: Mapping[str, str], held: _Held) -> Iterator[int]:
    """Operations that accumulate, once for each launch."""
    for index, op in enumerate(schedule.ops):
        if isinstance(op, Attend):
            yield from _attend(index, op, schedule, shape, held)
            continue
        taken = [held.take(aliases.get(name, name), chunks) for name, chunks in _reads(index, op, schedule)]
        if any(taken) or is_last_fold(schedule, index) or isinstance(op, Store):
            yield index


def _attend(index: int, op: Attend, schedule: Schedule, shape: Shape, held: _Held) -> Iterator[int]:
    into = [name for name in (op.q_into, op.kv_into) if name is not None]
    deep = [name for name in into if held.is_deep(name)]
    for name in deep:
        held.take(name, schedule.values[name].chunks)
    if deep:
        yield index
    # A kernel's results have the dtype of its inputs, whose sizes they share; statistics are wide.
    by_row, by_col = (("q",), ("k", "v")) if schedule.backward else (("dout", "lse"), ())
    for tile in op.tiles:
        sides = (by_row, tile.rows), (by_col, tile.cols)
        held.sizes.append(sum(rows_bytes(schedule, shape, tensors, end - first) for tensors, (first, end) in sides))
        for name, block, rows in zip(into, (op.q, op.kv), (tile.rows, tile.cols), strict=False):
            chunks = set(schedule.values[block[0]].chunks[slice(*rows)])
            held.parts.setdefault(name, []).append(_Part(len(held.sizes) - 1, index, chunks))
        held.note()
        if tile.masked or not holds_results(shape):
            # Results of several calls for parts of a tile are together no larger than those of the whole.
            held.parts.clear()
            yield index


def _reads(index: int, op: Op, schedule: Schedule) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Rows of values that an operation reads, or that are accumulated with what it adds."""
    match op:
        case Start(move=move):
            yield from ((message.value, message.chunks) for message in move.sends)
        case Store(sources=sources):
            yield from ((name, schedule.values[name].chunks) for name in sources)
        case Fold(source=source):
            yield source, schedule.values[source].chunks
            if is_last_fold(schedule, index):
                together = takewhile(lambda one: isinstance(one, Fold), reversed(schedule.ops[: index + 1]))
                yield from ((one.into, schedule.values[one.into].chunks) for one in together)
