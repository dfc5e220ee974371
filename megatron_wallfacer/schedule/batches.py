"""Documents whose kernel calls are one: a kernel that knows packed sequences takes them together.

A packed call wants the rows of its documents one after the other, and their columns too. In a tile of several chunks
the calls come document by document, each with one chunk after the other; what can be one call is then a diagonal of
them, and several such diagonals are open at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from megatron_wallfacer.schedule.attn_tile import AttnTile, CuSeqlens
from megatron_wallfacer.schedule.mask import Mask


def joined_calls(
    mask: Mask, q_chunks: Sequence[int], k_chunks: Sequence[int], cp_size: int, size: int
) -> tuple[AttnTile, ...]:
    """Return the calls of a mask (:meth:`Mask.calls`, with its arguments), joined.

    Without a window the calls of one query chunk are known from the boundaries of its documents, and are not made one
    by one: where documents are cut, each has a call in each pair of chunks.
    """
    if mask.documents is None or mask.has_window or len(q_chunks) != 1:
        return batches(mask.calls(q_chunks, k_chunks, cp_size, size))
    return tuple(_joined_calls(mask, q_chunks[0], k_chunks, cp_size, size))


def _joined_calls(mask: Mask, q_chunk: int, k_chunks: Sequence[int], cp_size: int, size: int) -> Iterator[AttnTile]:
    for index, k_chunk in enumerate(k_chunks):
        causal = mask.right == 0 and k_chunk == q_chunk
        if k_chunk == q_chunk or mask.cuts_documents:
            if k_chunk <= q_chunk or mask.right is None:
                yield from _of_all_documents(mask, q_chunk, (cp_size, size), index * size, causal=causal)
            continue
        # In a cut sequence two chunks have one document in common at most.
        for call in mask.calls((q_chunk,), (k_chunk,), cp_size, size):
            cols = call.cols[0] + index * size, call.cols[1] + index * size
            yield AttnTile(call.rows, cols, call.causal)


def _of_all_documents(
    mask: Mask, chunk: int, sizes: tuple[int, int], first_col: int, *, causal: bool
) -> Iterator[AttnTile]:
    """Yield the one call of all documents of a query chunk against the same documents of a key chunk, if any."""
    documents = _boundaries(mask, 0 if mask.cuts_documents else chunk, *sizes)
    extent, number = documents.q[-1], len(documents.q) - 1
    if not extent:
        return
    # Documents of one token are causal squares and rectangles.
    causal = causal and extent > number
    rows, cols = (0, extent), (first_col, first_col + extent)
    yield AttnTile(rows, cols, causal, cu_seqlens=documents if number > 1 else None)


@lru_cache(maxsize=1)
def _boundaries(mask: Mask, chunk: int, cp_size: int, size: int) -> CuSeqlens:
    """Return where the documents of a chunk begin and end in it. The last result is kept: one mask has many tiles."""
    ends = mask.boundaries(chunk, cp_size, size)
    return CuSeqlens(ends, ends)


def batches(calls: Sequence[AttnTile]) -> tuple[AttnTile, ...]:
    """The same live pairs in fewer calls.

    Joined are causal squares, or rectangles of which all is live, where each begins at the row and the column at which
    the one before it ends. Bands, and calls that follow no other, stay what they are.

    Args:
        calls: of a tile; no pair is live in two of them.
    """
    groups: list[_Group] = []
    # By the row and the column at which it ends: one group only, as the pair before that is live in no other.
    ending: dict[tuple[int, int], _Group] = {}
    for call in calls:
        group = ending.pop((call.rows[0], call.cols[0]), None) if call.window is None else None
        if group is None or not group.takes(call):
            group = _Group()
            groups.append(group)
        group.add(call)
        if call.window is None:
            ending[call.rows[1], call.cols[1]] = group
    return tuple(group.call() for group in groups)


@dataclass
class _Group:
    """Calls that will be one; ``causal`` is None while they are single pairs, which are both."""

    calls: list[AttnTile] = field(default_factory=list)
    causal: bool | None = None

    def takes(self, call: AttnTile) -> bool:
        return _is_pair(call) or self.causal in (None, call.causal)

    def add(self, call: AttnTile) -> None:
        self.calls.append(call)
        if not _is_pair(call):
            self.causal = call.causal

    def call(self) -> AttnTile:
        first, last = self.calls[0], self.calls[-1]
        if first is last:
            return first
        rows, cols = (first.rows[0], last.rows[1]), (first.cols[0], last.cols[1])
        # Each call begins where the one before it ends.
        cu_q = (0, *(call.rows[1] - rows[0] for call in self.calls))
        cu_k = (0, *(call.cols[1] - cols[0] for call in self.calls))
        return AttnTile(rows, cols, causal=bool(self.causal), cu_seqlens=CuSeqlens(cu_q, cu_k))


def _is_pair(call: AttnTile) -> bool:
    """One row and one column: causal or not is the same."""
    return call.rows[1] - call.rows[0] == 1 == call.cols[1] - call.cols[0]
