"""The zig-zag layout: the chunks of the sequence on each rank.

The sequence is divided into 2P equal chunks, and rank r has chunks r and 2P-1-r, as in Megatron. The layout balances
causal attention on every grid: a causal mask leaves exactly half of the (query, key) pairs of any two shards unmasked
(``docs/walkthrough.md``).

A *block* is the union of the shards of several ranks, with chunks sorted by position. With a causal mask, the query
rows of a block that see a key chunk are therefore the last rows of the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

CHUNKS_PER_RANK = 2


def shard_chunks(rank: int, cp_size: int) -> tuple[int, int]:
    """Return the ids of the two chunks of a rank, in the order of its local rows."""
    return rank, 2 * cp_size - 1 - rank


def block_chunks(ranks: Iterable[int], cp_size: int) -> tuple[int, ...]:
    """Return the chunk ids of all given ranks, sorted by position."""
    return tuple(sorted(chunk for rank in ranks for chunk in shard_chunks(rank, cp_size)))


def runs(chunks: Sequence[int], block: Sequence[int]) -> list[tuple[int, int]]:
    """Return the positions of some chunks in a block as the fewest half-open ranges.

    ``block`` must contain all of ``chunks``, and both must be sorted by position.
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
