"""Tiles: the fewest kernel calls that cover a query block against a key block.

Everything is decided from chunk ids. With both blocks sorted by position, query chunk c sees the
prefix of key chunks with smaller ids, and its own id under the causal triangle. So rows with the
same prefix form one full rectangle, and runs of chunks that stand in both blocks form one square
causal tile.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_wallfacer.schedule.mask import Pattern


@dataclass(frozen=True, slots=True)
class Tile:
    """One kernel call: rows of a query block against columns of a key block, in units of chunks.

    Attributes:
        rows: half-open range of chunks of the query block.
        cols: half-open range of chunks of the key block.
        causal: the tile is square and only its lower triangle is live; else every pair is.
        masked: some pairs are live, and which they are is for the mask to say.
    """

    rows: tuple[int, int]
    cols: tuple[int, int]
    causal: bool = False
    masked: bool = False

    @property
    def area(self) -> float:
        """Work in chunk squares; a causal tile counts half, a masked one in full."""
        square = (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])
        return square / 2 if self.causal else float(square)


def tiles(
    q_chunks: Sequence[int],
    k_chunks: Sequence[int],
    *,
    causal: bool,
    only: Collection[int] | None = None,
    pattern: Pattern | None = None,
) -> tuple[Tile, ...]:
    """Tiles of one query block against one key block.

    Args:
        q_chunks: chunk ids of the query rows, ascending.
        k_chunks: chunk ids of the key columns, ascending.
        causal: mask keys after the query's position; otherwise every pair is live.
        only: query chunks that are wanted; all unless given.
        pattern: what is live, in place of ``causal``.

    Returns:
        Tiles that cover each live pair of a wanted chunk exactly once; none where nothing is live.
    """
    if pattern is not None:
        wanted = [only is None or chunk in only for chunk in q_chunks]
        return tuple(_by_pattern(q_chunks, k_chunks, wanted, pattern))
    return _without_pattern(tuple(q_chunks), tuple(k_chunks), causal, None if only is None else frozenset(only))


# A search asks for the same blocks in many plans.
@lru_cache(maxsize=1024)
def _without_pattern(
    q_chunks: tuple[int, ...], k_chunks: tuple[int, ...], causal: bool, only: frozenset[int] | None
) -> tuple[Tile, ...]:
    wanted = [only is None or chunk in only for chunk in q_chunks]
    if not causal:
        return tuple(_full_rectangles([(0, len(k_chunks) * want) for want in wanted]))
    diagonals = _diagonal_runs([chunk if want else -1 for chunk, want in zip(q_chunks, wanted, strict=True)], k_chunks)
    # A row in a diagonal run sees in full only the keys before the whole run.
    prefix = [bisect_left(k_chunks, chunk) * want for chunk, want in zip(q_chunks, wanted, strict=True)]
    for tile in diagonals:
        for row in range(*tile.rows):
            prefix[row] = tile.cols[0]
    return (*diagonals, *_full_rectangles([(0, end) for end in prefix]))


def _by_pattern(
    q_chunks: Sequence[int], k_chunks: Sequence[int], wanted: Sequence[bool], pattern: Pattern
) -> Iterator[Tile]:
    """Masked tiles, a row of chunks each; then rectangles of what is live as a whole."""
    whole = []
    for row, (chunk, want) in enumerate(zip(q_chunks, wanted, strict=True)):
        live, all_live = ([bisect_left(k_chunks, end) for end in ends[chunk]] for ends in (pattern.live, pattern.whole))
        whole.append((all_live[0], all_live[1]) if want and all_live[0] < all_live[1] else (0, 0))
        first, end = whole[-1] if whole[-1][1] else (live[1], live[1])
        for cols in ((live[0], first), (end, live[1])):
            if want and cols[0] < cols[1]:
                yield Tile((row, row + 1), cols, masked=True)
    yield from _full_rectangles(whole)


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


def _full_rectangles(cols: Sequence[tuple[int, int]]) -> list[Tile]:
    """One rectangle for each stretch of rows that see the same keys, at least one."""
    rectangles: list[Tile] = []
    start = 0
    for row in range(1, len(cols) + 1):
        if row == len(cols) or cols[row] != cols[start]:
            if cols[start][1]:
                rectangles.append(Tile((start, row), cols[start]))
            start = row
    return rectangles
