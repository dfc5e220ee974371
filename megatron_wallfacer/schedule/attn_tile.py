"""The tile of one kernel call with its mask. The scheduler, the engine and the kernels share this type."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple


class TileWindow(NamedTuple):
    """The unmasked diagonals of a tile, counted from its top-left corner.

    Attributes:
        left: row i sees only columns j >= i - left, where ``left`` may be negative; None for no limit.
        right: row i sees only columns j <= i + right, where ``right`` may be negative; None for no limit.
    """

    left: int | None = None
    right: int | None = None


@dataclass(frozen=True)
class CuSeqlens:
    """Boundaries of the documents of a tile, in tokens from the first row and the first column of the tile.

    The hash is computed once, because a sequence may have 65,536 documents.

    Attributes:
        q: row boundaries ``[documents + 1]``, ascending from 0: document d has rows q[d] to q[d + 1].
        k: column boundaries ``[documents + 1]``, ascending from 0: document d has columns k[d] to k[d + 1].
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.q, self.k)))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Return the largest number of rows of any document, and the largest number of columns of any document."""
        q, k = (max(end - start for start, end in pairwise(side)) for side in (self.q, self.k))
        return q, k


class AttnTile(NamedTuple):
    """The query rows and key columns of one kernel call.

    Attributes:
        rows: half-open range of token rows of the query block.
        cols: half-open range of token columns of the key block.
        causal: whether the tile is square and only its lower triangle is unmasked. With ``cu_seqlens``, whether each
            document's part of the tile is such a square.
        window: range of unmasked diagonals; None without a window. With a window, ``causal`` is False. Each row and
            each column has an unmasked pair.
        cu_seqlens: boundaries of several documents, whose queries see only keys of their own document. Tiles with
            ``cu_seqlens`` have no ``window``.
    """

    rows: tuple[int, int]
    cols: tuple[int, int]
    causal: bool = False
    window: TileWindow | None = None
    cu_seqlens: CuSeqlens | None = None

    @property
    def height(self) -> int:
        """Return the number of rows."""
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        """Return the number of columns."""
        return self.cols[1] - self.cols[0]


def documents_of(tile: AttnTile) -> list[AttnTile]:
    """Return one tile per document. Rows and columns are counted from the top-left corner of the varlen tile."""
    assert tile.cu_seqlens is not None
    sides = (pairwise(tile.cu_seqlens.q), pairwise(tile.cu_seqlens.k))
    return [AttnTile(rows, cols, tile.causal) for rows, cols in zip(*sides, strict=True)]
