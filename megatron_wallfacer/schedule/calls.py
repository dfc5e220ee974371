"""The kernel calls of a mask: tiles that cover the unmasked pairs of query chunks and key chunks.

The functions of this module need time that is linear in the number of documents and of kernel calls.

With ``shard_mode="sequence"``, the first and the last document of a chunk may extend into other chunks. Each of the
other documents needs a single kernel call. With ``per_document`` each document has a piece in every chunk.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from megatron_wallfacer.schedule.attn_tile import AttnTile, TileWindow

if TYPE_CHECKING:
    from megatron_wallfacer.schedule.mask import Mask


class Segment(NamedTuple):
    """Consecutive tokens of a document.

    The first token is at ``position`` in the document, and at ``row`` in a block.
    """

    document: int
    position: int
    row: int
    length: int


def overlapping(ends: Sequence[int], first: int, end: int) -> range:
    """Return the documents with tokens between two positions of the sequence; ``ends`` are document boundaries."""
    return range(bisect_right(ends, first) - 1, min(bisect_left(ends, end), len(ends) - 1))


def calls_of(
    mask: Mask, q_chunks: Sequence[int], k_chunks: Sequence[int], cp_size: int, size: int
) -> Iterator[AttnTile]:
    """Yield the tiles of :meth:`Mask.calls` by row, then by column. The arguments are those of :meth:`Mask.calls`."""
    for index, q_chunk in enumerate(q_chunks):
        if not mask.is_per_document:
            yield from _of_sequence(mask, (index, q_chunk), k_chunks, cp_size, size)
        elif mask.has_window:
            yield from _of_each_document(mask, (index, q_chunk), k_chunks, cp_size, size)
        else:
            ends = mask.boundaries(q_chunk, cp_size, size)
            cols = [(col, k_chunk) for col, k_chunk in enumerate(k_chunks) if mask.right is None or k_chunk <= q_chunk]
            shifts = [(col * size, mask.right == 0 and k_chunk == q_chunk) for col, k_chunk in cols]
            yield from _squares(ends, index * size, shifts)


def call_of(mask: Mask, q: Segment, k: Segment) -> AttnTile | None:
    """Return the tile of query and key segments of one document; None if all pairs are masked."""
    apart = k.position - q.position
    lower = -q.length if mask.left is None else -mask.left - apart
    upper = k.length if mask.right is None else mask.right - apart
    # Row i sees columns i + lower to i + upper. The tile omits rows that see no column and columns that no row sees.
    first_row, end_row = max(0, -upper), min(q.length, k.length - lower)
    first_col, end_col = max(0, first_row + lower), min(k.length, end_row + upper)
    if first_row >= end_row or first_col >= end_col:
        return None
    height, width, shift = end_row - first_row, end_col - first_col, first_row - first_col
    window = TileWindow(
        -(lower + shift) if lower + shift > 1 - height else None, upper + shift if upper + shift < width - 1 else None
    )
    rows, cols = (q.row + first_row, q.row + end_row), (k.row + first_col, k.row + end_col)
    if window == TileWindow(None, 0) and height == width:
        return AttnTile(rows, cols, causal=True)
    return AttnTile(rows, cols, window=None if window == TileWindow() else window)


def _of_sequence(
    mask: Mask, query: tuple[int, int], k_chunks: Sequence[int], cp_size: int, size: int
) -> Iterator[AttnTile]:
    index, chunk = query
    first = chunk * size
    ends = mask.documents or (0, 2 * cp_size * size)
    documents = overlapping(ends, first, first + size)
    if not documents:
        return
    yield from _of_document(mask, ends, documents[0], query, k_chunks, size)
    if len(documents) == 1:
        return
    inner = ends[documents[1] : documents[-1] + 1]
    shifts = [(col * size - first, mask.right == 0) for col, k_chunk in enumerate(k_chunks) if k_chunk == chunk]
    if mask.has_window:
        for document, (start, end) in enumerate(pairwise(inner), documents[1]):
            q = Segment(document, 0, start - first + index * size, end - start)
            yield from _some(call_of(mask, q, q._replace(row=start + shift)) for shift, _ in shifts)
    else:
        yield from _squares(inner, index * size - first, shifts)
    yield from _of_document(mask, ends, documents[-1], query, k_chunks, size)


def _of_document(
    mask: Mask, ends: Sequence[int], document: int, query: tuple[int, int], k_chunks: Sequence[int], size: int
) -> Iterator[AttnTile]:
    """Yield the kernel calls for the queries of one document in one chunk. Keys may be in other chunks."""
    q, *keys = (_segment(ends, document, place, size) for place in (query, *enumerate(k_chunks)))
    assert q is not None
    return _some(call_of(mask, q, k) for k in keys if k is not None)


def _segment(ends: Sequence[int], document: int, place: tuple[int, int], size: int) -> Segment | None:
    """Return the tokens of a document in a chunk, or None. ``place`` is (index of the chunk in a block, chunk id)."""
    index, chunk = place
    start, low = ends[document], max(chunk * size, ends[document])
    length = min((chunk + 1) * size, ends[document + 1]) - low
    return Segment(document, low - start, (index - chunk) * size + low, length) if length > 0 else None


def _of_each_document(
    mask: Mask, query: tuple[int, int], k_chunks: Sequence[int], cp_size: int, size: int
) -> Iterator[AttnTile]:
    index, chunk = query
    for document, (start, end) in enumerate(pairwise(mask.boundaries(chunk, cp_size, size))):
        piece = end - start
        q = Segment(document, chunk * piece, index * size + start, piece)
        keys = (Segment(document, k_chunk * piece, col * size + start, piece) for col, k_chunk in enumerate(k_chunks))
        yield from _some(call_of(mask, q, k) for k in keys)


def _squares(ends: Sequence[int], row: int, cols: Sequence[tuple[int, bool]]) -> Iterator[AttnTile]:
    """Yield one kernel call for each document and key chunk, with as many rows as columns. A call is full or causal.

    Args:
        ends: boundaries of the documents inside a chunk, in tokens.
        row: first row of the query chunk in the query block.
        cols: (first column in the key block, whether the calls are causal) of each key chunk.
    """
    return (
        # A call of one row and one column is both full and causal.
        AttnTile((start + row, end + row), (start + col, end + col), causal and end - start > 1)
        for start, end in pairwise(ends)
        for col, causal in cols
    )


def _some(calls: Iterable[AttnTile | None]) -> Iterator[AttnTile]:
    return (call for call in calls if call is not None)
