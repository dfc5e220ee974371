"""The zig-zag layout: which chunks of the sequence a rank holds.

The sequence is cut into 2P equal chunks and rank r holds chunks r and 2P-1-r. This is the layout
that Megatron already uses, and it makes causal attention balanced for every grid: any query shard
against any key shard costs exactly half a shard square (``docs/design.md``).

A *block* is the union of several ranks' shards. Its chunks are kept sorted by position, so that the
rows that a key chunk can see are always a suffix of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

CHUNKS_PER_RANK = 2


def shard_chunks(rank: int, cp_size: int) -> tuple[int, int]:
    """Ids of the two chunks that ``rank`` holds, in the order in which it holds them."""
    return rank, 2 * cp_size - 1 - rank


def block_chunks(ranks: Iterable[int], cp_size: int) -> tuple[int, ...]:
    """Chunk ids of the block made of these ranks' shards, sorted by position."""
    return tuple(sorted(chunk for rank in ranks for chunk in shard_chunks(rank, cp_size)))


def runs(chunks: Sequence[int], block: Sequence[int]) -> list[tuple[int, int]]:
    """Where chunks stand in a block that has them all: half-open ranges of its rows, as few as there are.

    Both are sorted by position.
    """
    row = {chunk: index for index, chunk in enumerate(block)}
    found: list[tuple[int, int]] = []
    for chunk in chunks:
        here = row[chunk]
        if found and found[-1][1] == here:
            found[-1] = (found[-1][0], here + 1)
        else:
            found.append((here, here + 1))
    return found
