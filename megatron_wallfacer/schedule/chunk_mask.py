"""Chunk masks, which state for pairs of a query chunk and a key chunk whether they are full, partial or empty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_wallfacer.schedule.calls import overlapping

if TYPE_CHECKING:
    from megatron_wallfacer.schedule.mask import Mask

#: Half-open range of chunk ids, or of tokens.
Range = tuple[int, int]


@dataclass(frozen=True)
class ChunkMask:
    """A mask in units of chunks. The key chunks that a query chunk sees are consecutive.

    Attributes:
        nonempty: half-open range of key chunks with an unmasked pair, for each query chunk.
        full: half-open range of key chunks in which every pair is unmasked, for each query chunk; (0, 0) for none.
    """

    nonempty: tuple[Range, ...]
    full: tuple[Range, ...]

    @property
    def is_sparse(self) -> bool:
        """Return whether chunk pairs below the causal diagonal are empty, so that some rows need not be sent."""
        return any(first > 0 or end <= chunk for chunk, (first, end) in enumerate(self.nonempty))


def chunk_mask_of(mask: Mask, cp_size: int, size: int) -> ChunkMask | None:
    """Return a mask in units of chunks; None for the causal triangle and for full attention.

    Args:
        mask: unmasked pairs.
        cp_size: P, the number of context-parallel ranks.
        size: tokens of a chunk.
    """
    if mask.is_plain:
        return None
    rows = [mask.key_chunks(chunk, cp_size, size) for chunk in range(2 * cp_size)]
    return ChunkMask(tuple(nonempty for nonempty, _ in rows), tuple(full for _, full in rows))


def key_chunks_of(mask: Mask, chunk: int, cp_size: int, size: int) -> tuple[Range, Range]:
    """Return the ranges of :meth:`Mask.key_chunks` for windows and documents."""
    if mask.is_per_document:
        # The window covers the most chunks in the shortest document.
        piece = mask.shortest // (2 * cp_size)
        queries, keys = (chunk * piece, (chunk + 1) * piece), (0, 2 * cp_size * piece)
        nonempty, full = _key_chunks(mask, queries, keys, piece)
        return nonempty, full if piece == size else (0, 0)
    first, end = chunk * size, (chunk + 1) * size
    ends = mask.documents or (0, 2 * cp_size * size)
    documents = overlapping(ends, first, end)
    if not documents:
        return (0, 0), (0, 0)
    # The keys that a query sees ascend with its position, so the first and the last document of the chunk decide.
    ranges = []
    for document in (documents[0], documents[-1]):
        start, stop = ends[document], ends[document + 1]
        ranges.append(_key_chunks(mask, (max(first, start), min(end, stop)), (start, stop), size))
    (first_nonempty, full), (last_nonempty, _) = ranges
    is_one_document = ends[documents[0]] <= first and end <= ends[documents[0] + 1]
    return (first_nonempty[0], last_nonempty[1]), full if is_one_document else (0, 0)


def _key_chunks(mask: Mask, queries: Range, document: Range, size: int) -> tuple[Range, Range]:
    """Return the key chunks of which some query sees a part, and the key chunks that every query sees in full.

    ``queries`` and ``document`` are half-open ranges of positions. Chunk 0 begins at position 0.
    """
    (first, last), (start, end) = (queries[0], queries[1] - 1), document
    some_from = start if mask.left is None else max(start, first - mask.left)
    some_until = end if mask.right is None else min(end, last + mask.right + 1)
    every_from = start if mask.left is None else max(start, last - mask.left)
    every_until = end if mask.right is None else min(end, first + mask.right + 1)
    full = -(-every_from // size), every_until // size
    return (some_from // size, -(-some_until // size)), full if full[0] < full[1] else (0, 0)
