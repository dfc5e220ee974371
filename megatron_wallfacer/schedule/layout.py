"""The zig-zag layout: which chunks of the sequence a rank holds.

The sequence is cut into 2P equal chunks and rank r holds chunks r and 2P-1-r. This is the layout
that Megatron already uses, and it makes causal attention balanced for every grid: any query shard
against any key shard costs exactly half a shard square (``docs/design.md``).

A *block* is the union of several ranks' shards. Its chunks are kept sorted by position, so that the
rows that a key chunk can see are always a suffix of it.
"""

from __future__ import annotations

from collections.abc import Sequence

CHUNKS_PER_RANK = 2


def shard_chunks(rank: int, cp_size: int) -> tuple[int, int]:
    """Ids of the two chunks that ``rank`` holds, in the order in which it holds them."""
    return rank, 2 * cp_size - 1 - rank


def block_chunks(ranks: Sequence[int], cp_size: int) -> tuple[int, ...]:
    """Chunk ids of the block made of these ranks' shards, sorted by position."""
    return tuple(sorted(chunk for rank in ranks for chunk in shard_chunks(rank, cp_size)))


def sorting_order(ranks: Sequence[int], cp_size: int) -> tuple[int, ...]:
    """Where to find each chunk of the sorted block in the shards laid end to end.

    Entry i is the index, among the ``2 * len(ranks)`` chunks as gathered rank by rank, of the chunk
    that comes i-th in :func:`block_chunks`.
    """
    gathered = [chunk for rank in ranks for chunk in shard_chunks(rank, cp_size)]
    return tuple(sorted(range(len(gathered)), key=gathered.__getitem__))


def inverse_order(order: Sequence[int]) -> tuple[int, ...]:
    """The order that undoes ``order``: from the sorted block back to shards laid end to end."""
    inverse = [0] * len(order)
    for new, old in enumerate(order):
        inverse[old] = new
    return tuple(inverse)
