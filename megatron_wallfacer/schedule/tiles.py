"""Tiles: the fewest kernel calls that cover a query block against a key block.

Everything is decided from chunk ids. With both blocks sorted by position, query chunk c sees the
prefix of key chunks with smaller ids, and its own id under the causal triangle. So rows with the
same prefix form one full rectangle, and runs of chunks that stand in both blocks form one square
causal tile.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One kernel call: rows of a query block against columns of a key block, in units of chunks.

    Attributes:
        rows: half-open range of chunks of the query block.
        cols: half-open range of chunks of the key block.
        causal: the tile is square and only its lower triangle is live; else every pair is.
    """

    rows: tuple[int, int]
    cols: tuple[int, int]
    causal: bool = False

    @property
    def area(self) -> float:
        """Work in chunk squares; a causal tile counts half."""
        square = (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])
        return square / 2 if self.causal else float(square)


def tiles(
    q_chunks: Sequence[int], k_chunks: Sequence[int], *, causal: bool, only: Collection[int] | None = None
) -> tuple[Tile, ...]:
    """Tiles of one query block against one key block.

    Args:
        q_chunks: chunk ids of the query rows, ascending.
        k_chunks: chunk ids of the key columns, ascending.
        causal: mask keys after the query's position; otherwise every pair is live.
        only: query chunks that are wanted; all unless given.

    Returns:
        Tiles that cover each live pair of a wanted chunk exactly once; none where nothing is live.
    """
    wanted = [only is None or chunk in only for chunk in q_chunks]
    if not causal:
        return tuple(_full_rectangles([len(k_chunks) * want for want in wanted]))
    diagonals = _diagonal_runs([chunk if want else -1 for chunk, want in zip(q_chunks, wanted, strict=True)], k_chunks)
    # A row in a diagonal run sees in full only the keys before the whole run.
    prefix = [bisect_left(k_chunks, chunk) * want for chunk, want in zip(q_chunks, wanted, strict=True)]
    for tile in diagonals:
        for row in range(*tile.rows):
            prefix[row] = tile.cols[0]
    return (*diagonals, *_full_rectangles(prefix))


def _diagonal_runs(q_chunks: Sequence[int], k_chunks: Sequence[int]) -> list[Tile]:
    """Maximal runs of chunks that follow each other in both blocks, as square causal tiles."""
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


def _full_rectangles(prefix: Sequence[int]) -> list[Tile]:
    """One rectangle for each stretch of rows that see the same, non-empty prefix of keys."""
    rectangles: list[Tile] = []
    start = 0
    for row in range(1, len(prefix) + 1):
        if row == len(prefix) or prefix[row] != prefix[start]:
            if prefix[start]:
                rectangles.append(Tile((start, row), (0, prefix[start])))
            start = row
    return rectangles
