"""Varlen calls: join kernel calls for single documents into one call with ``cu_seqlens``.

Each document of a varlen call must begin at the row and the column where the previous document ends. In a tile of
several chunks the calls are ordered by document, then by chunk. Calls that can be joined are not neighbours in this
order. Therefore :func:`batches` builds several varlen calls at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from megatron_wallfacer.schedule.attn_tile import AttnTile, CuSeqlens
from megatron_wallfacer.schedule.mask import Mask


def joined_calls(
    mask: Mask, q_chunks: Sequence[int], k_chunks: Sequence[int], cp_size: int, size: int
) -> tuple[AttnTile, ...]:
    """Return the kernel calls of a mask, joined where possible. The arguments are those of :meth:`Mask.calls`.

    Without a window, the kernel calls of a query chunk follow from the document boundaries alone. With
    ``per_document``, each document has a call for each pair of chunks, and joining so many calls would be slow.
    """
    if mask.documents is None or mask.has_window or len(q_chunks) != 1:
        return batches(mask.calls(q_chunks, k_chunks, cp_size, size))
    return tuple(_joined_calls(mask, q_chunks[0], k_chunks, cp_size, size))


def _joined_calls(mask: Mask, q_chunk: int, k_chunks: Sequence[int], cp_size: int, size: int) -> Iterator[AttnTile]:
    for index, k_chunk in enumerate(k_chunks):
        causal = mask.right == 0 and k_chunk == q_chunk
        if k_chunk == q_chunk or mask.is_per_document:
            if k_chunk <= q_chunk or mask.right is None:
                yield from _of_all_documents(mask, q_chunk, (cp_size, size), index * size, causal=causal)
            continue
        # With ``shard_mode`` ``sequence`` two chunks have at most one document in common.
        for call in mask.calls((q_chunk,), (k_chunk,), cp_size, size):
            cols = call.cols[0] + index * size, call.cols[1] + index * size
            yield AttnTile(call.rows, cols, call.causal)


def _of_all_documents(
    mask: Mask, chunk: int, sizes: tuple[int, int], first_col: int, *, causal: bool
) -> Iterator[AttnTile]:
    """Yield one call for all documents of a query chunk and a key chunk that contain the same documents."""
    documents = _boundaries(mask, 0 if mask.is_per_document else chunk, *sizes)
    extent, number = documents.q[-1], len(documents.q) - 1
    if not extent:
        return
    # If every document has one token, each causal square is also a full rectangle.
    causal = causal and extent > number
    rows, cols = (0, extent), (first_col, first_col + extent)
    yield AttnTile(rows, cols, causal, cu_seqlens=documents if number > 1 else None)


@lru_cache(maxsize=1)
def _boundaries(mask: Mask, chunk: int, cp_size: int, size: int) -> CuSeqlens:
    """Return the boundaries of the documents in a chunk. The result is cached, because many tiles share it."""
    ends = mask.boundaries(chunk, cp_size, size)
    return CuSeqlens(ends, ends)


def batches(calls: Sequence[AttnTile]) -> tuple[AttnTile, ...]:
    """Join kernel calls, and return fewer calls with the same unmasked pairs.

    Two calls are joined if the second begins at the row and the column where the first ends. Both must be causal
    squares, or both full rectangles. Calls with a window are returned unchanged, and so are calls that cannot be
    joined. No two calls may have an unmasked pair in common.
    """
    groups: list[list[AttnTile]] = []
    # Groups by the row and the column where they end, and whether they are causal; None if each call is a single pair.
    # The keys are unique, since no two calls have a pair in common.
    ending: dict[tuple[int, int], tuple[list[AttnTile], bool | None]] = {}
    for call in calls:
        if call.window is not None:
            groups.append([call])
            continue
        group, is_causal = ending.pop((call.rows[0], call.cols[0]), ([], None))
        causal = None if _is_pair(call) else call.causal
        if not group or (is_causal != causal and None not in (is_causal, causal)):
            group, is_causal = [], None
            groups.append(group)
        group.append(call)
        ending[call.rows[1], call.cols[1]] = group, is_causal if causal is None else causal
    return tuple(map(_joined, groups))


def _joined(calls: Sequence[AttnTile]) -> AttnTile:
    """Return one call for several calls, each of which begins where its predecessor ends."""
    first, last = calls[0], calls[-1]
    if first is last:
        return first
    rows, cols = (first.rows[0], last.rows[1]), (first.cols[0], last.cols[1])
    cu_q = (0, *(call.rows[1] - rows[0] for call in calls))
    cu_k = (0, *(call.cols[1] - cols[0] for call in calls))
    causal = any(call.causal for call in calls if not _is_pair(call))
    return AttnTile(rows, cols, causal, cu_seqlens=CuSeqlens(cu_q, cu_k))


def _is_pair(call: AttnTile) -> bool:
    """Return whether a call has one row and one column, so that it is both full and causal."""
    return call.rows[1] - call.rows[0] == 1 == call.cols[1] - call.cols[0]
