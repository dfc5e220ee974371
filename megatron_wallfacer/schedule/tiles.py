"""Tiles: the fewest kernel calls that cover a query block against a key block.

Chunk ids determine the tiles. With a causal mask, query chunk c sees all key chunks with smaller ids, and the causal
triangle of key chunk c. Query rows that see the same key chunks form one full rectangle. Consecutive chunks that are in
both blocks form one square causal tile.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from megatron_wallfacer.schedule.mask import ChunkMask


@dataclass(frozen=True, slots=True)
class Tile:
    """One kernel call: rows of a query block against columns of a key block, in units of chunks.

    Attributes:
        rows: half-open range of indices of chunks in the query block.
        cols: half-open range of indices of chunks in the key block.
        causal: whether the tile is square and only its lower triangle is unmasked.
        partial: whether the tile has masked pairs, but is not causal. In a tile that is neither causal nor partial, all
            pairs are unmasked.
    """

    rows: tuple[int, int]
    cols: tuple[int, int]
    causal: bool = False
    partial: bool = False

    @property
    def area(self) -> float:
        """Return the work of the tile, in pairs of chunks. A causal tile has half the work of a full tile."""
        square = (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])
        return square / 2 if self.causal else float(square)


def tiles(
    q_chunks: Sequence[int],
    k_chunks: Sequence[int],
    *,
    causal: bool,
    only: Collection[int] | None = None,
    chunk_mask: ChunkMask | None = None,
) -> tuple[Tile, ...]:
    """Return the tiles of one query block against one key block.

    Args:
        q_chunks: chunk ids of the query rows, ascending.
        k_chunks: chunk ids of the key columns, ascending.
        causal: whether the mask is causal; otherwise attention is full.
        only: query chunks to compute; None for all.
        chunk_mask: unmasked chunk pairs, in place of ``causal``.

    Returns:
        Tiles that cover every unmasked pair of a selected query and a key exactly once.
    """
    if chunk_mask is not None:
        wanted = [only is None or chunk in only for chunk in q_chunks]
        return tuple(_by_chunk_mask(q_chunks, k_chunks, wanted, chunk_mask))
    return _without_chunk_mask(tuple(q_chunks), tuple(k_chunks), causal, None if only is None else frozenset(only))


# Cached, because many plans of a search have the same blocks.
@lru_cache(maxsize=1024)
def _without_chunk_mask(
    q_chunks: tuple[int, ...], k_chunks: tuple[int, ...], causal: bool, only: frozenset[int] | None
) -> tuple[Tile, ...]:
    wanted = [only is None or chunk in only for chunk in q_chunks]
    if not causal:
        return tuple(_full_rectangles([(0, len(k_chunks) * want) for want in wanted]))
    diagonals = _diagonal_runs([chunk if want else -1 for chunk, want in zip(q_chunks, wanted, strict=True)], k_chunks)
    # A row in a diagonal run sees in full only the key chunks before the whole run.
    prefix = [bisect_left(k_chunks, chunk) * want for chunk, want in zip(q_chunks, wanted, strict=True)]
    for tile in diagonals:
        for row in range(*tile.rows):
            prefix[row] = tile.cols[0]
    return (*diagonals, *_full_rectangles([(0, end) for end in prefix]))


def _by_chunk_mask(
    q_chunks: Sequence[int], k_chunks: Sequence[int], wanted: Sequence[bool], chunk_mask: ChunkMask
) -> Iterator[Tile]:
    """Yield the partial tiles of each query chunk, then the full tiles."""
    full_cols = []
    for row, (chunk, want) in enumerate(zip(q_chunks, wanted, strict=True)):
        first, end = (bisect_left(k_chunks, bound) for bound in chunk_mask.nonempty[chunk])
        full = tuple(bisect_left(k_chunks, bound) for bound in chunk_mask.full[chunk])
        full_cols.append(full if want and full[0] < full[1] else (0, 0))
        full_first, full_end = full_cols[-1] if full_cols[-1][1] else (end, end)
        for cols in ((first, full_first), (full_end, end)):
            if want and cols[0] < cols[1]:
                yield Tile((row, row + 1), cols, partial=True)
    yield from _full_rectangles(full_cols)


def _diagonal_runs(q_chunks: Sequence[int], k_chunks: Sequence[int]) -> list[Tile]:
    column = {chunk: index for index, chunk in enumerate(k_chunks)}
    runs: list[Tile] = []
    for row, chunk in enumerate(q_chunks):
        col = column.get(chunk)
        if col is None:
            continue
        if runs and runs[-1].rows[1] == row and runs[-1].cols[1] == col:
            last = runs.pop()
            runs.append(Tile((last.rows[0], row + 1), (last.cols[0], col + 1), causal=True))
        else:
            runs.append(Tile((row, row + 1), (col, col + 1), causal=True))
    return runs


def _full_rectangles(cols: Sequence[tuple[int, int]]) -> Iterator[Tile]:
    """Yield one full rectangle for each run of rows that see the same key chunks. Rows without keys are omitted."""
    start = 0
    for seen, run in groupby(cols):
        end = start + len([*run])
        if seen[1]:
            yield Tile((start, end), seen)
        start = end
