"""The one description of a kernel call's mask, from :class:`megatron_wallfacer.schedule.mask.Mask` to the library."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple


class TileWindow(NamedTuple):
    """The diagonals of a tile that are unmasked, counted from its top-left corner.

    Attributes:
        left: row i sees columns j >= i - left; None for no limit; may be negative.
        right: row i sees columns j <= i + right; None for no limit; may be negative.
    """

    left: int | None = None
    right: int | None = None


@dataclass(frozen=True)
class CuSeqlens:
    """Boundaries of the documents of a tile, in tokens from the tile's first row and first column.

    The hash is computed once: a sequence may hold 65,536 documents.

    Attributes:
        q: ``[documents + 1]`` ascending from 0: document d has rows q[d] to q[d + 1].
        k: ``[documents + 1]`` ascending from 0: document d has columns k[d] to k[d + 1].
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
        """The most rows and the most columns of a document."""
        q, k = (max(end - start for start, end in pairwise(side)) for side in (self.q, self.k))
        return q, k


class AttnTile(NamedTuple):
    """Query rows against key columns: one kernel call.

    Attributes:
        rows: token rows of the query block, half-open.
        cols: token columns of the key block, half-open.
        causal: a square's lower triangle; with ``cu_seqlens`` that of each document.
        window: unmasked diagonals, in place of ``causal``; each row and each column has an unmasked pair.
        cu_seqlens: several documents in one call, each of which sees itself alone; no window then.
    """

    rows: tuple[int, int]
    cols: tuple[int, int]
    causal: bool = False
    window: TileWindow | None = None
    cu_seqlens: CuSeqlens | None = None

    @property
    def height(self) -> int:
        """The number of rows."""
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.cols[1] - self.cols[0]


def documents_of(tile: AttnTile) -> list[AttnTile]:
    """Return a tile per document of a tile with ``cu_seqlens``, rows and columns counted from its corner."""
    assert tile.cu_seqlens is not None
    sides = (pairwise(tile.cu_seqlens.q), pairwise(tile.cu_seqlens.k))
    return [AttnTile(rows, cols, tile.causal) for rows, cols in zip(*sides, strict=True)]
