"""Masks: which key a query may see, and what kernel calls that makes of a block of pairs.

Documents of a packed sequence do not see each other. A window limits how far a query sees. Both are decided from
positions alone. Two layouts of packed sequences exist: ``sequence`` cuts the whole sequence into 2P chunks wherever the
documents end (Megatron's ``--dataloader-inter-document-masking``), ``document`` cuts each document into 2P chunks, and
chunk c of the sequence is what all documents' chunks c make (Megatron's ``--sft``, TransformerEngine's thd).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.attn_tile import AttnTile, TileWindow

#: What can be cut into 2P chunks: the whole sequence, or each document.
CUTS = ("sequence", "document")


class Segment(NamedTuple):
    """Consecutive tokens of one document: ``length`` of them, at ``position`` in it, at ``row`` of a block."""

    document: int
    position: int
    row: int
    length: int


@dataclass(frozen=True)
class Mask:
    """Which (query, key) pairs are live.

    Attributes:
        left, right: how many keys before and after its own position a query sees; None is no limit. Causal: right = 0.
        documents: where documents begin and end in the sequence, from 0 on; None for a single one. Tokens after the
            last (padding) see nothing and are not seen.
        cut: what is cut into 2P chunks, the ``sequence`` or each ``document``.

    Raises:
        OptionError: a negative window, or boundaries that do not ascend from 0.
    """

    left: int | None = None
    right: int | None = 0
    documents: tuple[int, ...] | None = None
    cut: Literal["sequence", "document"] = "sequence"

    def __post_init__(self) -> None:
        if any(side is not None and side < 0 for side in (self.left, self.right)):
            raise OptionError("window_size", (self.left, self.right), "numbers of tokens, 0 or more, -1 for no limit")
        ends = self.documents
        if ends is not None and (len(ends) < 2 or ends[0] != 0 or any(b <= a for a, b in pairwise(ends))):
            raise OptionError("cu_seqlens", ends, "ascending from 0 to the length of the sequence")

    @property
    def is_plain(self) -> bool:
        """One document and no window: the causal triangle, or everything."""
        return self.documents is None and not self.has_window

    @property
    def has_window(self) -> bool:
        """A sliding window, whose edges run through tiles as diagonals other than that of the causal triangle."""
        return self.left is not None or self.right not in (0, None)

    @property
    def cuts_documents(self) -> bool:
        """Each document is cut into 2P chunks, and not the sequence."""
        return self.cut == "document" and self.documents is not None

    @property
    def reorders(self) -> bool:
        """A rank's rows, as they are given, are in another order than that of its two chunks."""
        return self.documents is not None and self.cut == "document" and len(self.documents) > 2

    def check(self, cp_size: int, tokens: int) -> None:
        """Whether the documents are of the sequence and can be cut.

        Args:
            cp_size: P.
            tokens: of the whole sequence.

        Raises:
            OptionError: they do not.
        """
        if self.documents is None:
            return
        end = self.documents[-1]
        if end > tokens or (end < tokens and self.cut == "document"):
            raise OptionError("cu_seqlens", f"ending at {end}", f"ending at the {tokens} tokens of q")
        self.check_lengths(cp_size)

    def check_lengths(self, cp_size: int) -> None:
        """Check that each document can be cut into 2P chunks, where documents are what is cut.

        Raises:
            OptionError: one cannot.
        """
        if not self.cuts_documents:
            return
        for length in self._lengths():
            if length % (2 * cp_size):
                padded = f"padded to multiples of 2P = {2 * cp_size}"
                raise OptionError("cu_seqlens", f"with a document of {length} tokens", padded)

    def segments(self, chunk: int, cp_size: int, size: int, row: int = 0) -> Iterator[Segment]:
        """What a chunk consists of.

        Args:
            chunk: its id.
            cp_size: P.
            size: tokens of a chunk.
            row: at which the chunk begins in its block.
        """
        if self.cuts_documents:
            for document, length in enumerate(self._lengths()):
                piece = length // (2 * cp_size)
                yield Segment(document, chunk * piece, row, piece)
                row += piece
            return
        first, end = chunk * size, (chunk + 1) * size
        ends = self.documents or (0, 2 * cp_size * size)
        for document, (start, stop) in enumerate(pairwise(ends)):
            low, high = max(first, start), min(end, stop)
            if low < high:
                yield Segment(document, low - start, row + low - first, high - low)

    def calls(self, q_chunks: Sequence[int], k_chunks: Sequence[int], cp_size: int, size: int) -> tuple[AttnTile, ...]:
        """Return tiles that cover each unmasked pair of some query chunks and some key chunks exactly once.

        Each row and each column of a tile has an unmasked pair.

        Args:
            q_chunks, k_chunks: ids, of the rows and the columns in their order.
            cp_size: P.
            size: tokens of a chunk.
        """
        rows = self._all_segments(q_chunks, cp_size, size)
        cols = self._all_segments(k_chunks, cp_size, size)
        calls = (self._call(q, k) for q in rows for k in cols if q.document == k.document)
        return tuple(call for call in calls if call is not None)

    def _all_segments(self, chunks: Sequence[int], cp_size: int, size: int) -> list[Segment]:
        blocks = (self.segments(chunk, cp_size, size, index * size) for index, chunk in enumerate(chunks))
        return [segment for block in blocks for segment in block]

    def _call(self, q: Segment, k: Segment) -> AttnTile | None:
        """What of a segment of queries sees what of a segment of keys of the same document."""
        apart = k.position - q.position
        lower = -q.length if self.left is None else -self.left - apart
        upper = k.length if self.right is None else self.right - apart
        # Row i sees columns i + lower to i + upper; off with rows that see none, and columns that none sees.
        first_row, end_row = max(0, -upper), min(q.length, k.length - lower)
        first_col, end_col = max(0, first_row + lower), min(k.length, end_row + upper)
        if first_row >= end_row or first_col >= end_col:
            return None
        height, width, shift = end_row - first_row, end_col - first_col, first_row - first_col
        window = TileWindow(
            -(lower + shift) if lower + shift > 1 - height else None,
            upper + shift if upper + shift < width - 1 else None,
        )
        rows, cols = (q.row + first_row, q.row + end_row), (k.row + first_col, k.row + end_col)
        if window == TileWindow(None, 0) and height == width:
            return AttnTile(rows, cols, causal=True)
        return AttnTile(rows, cols, window=None if window == TileWindow() else window)

    def _lengths(self) -> list[int]:
        return [end - start for start, end in pairwise(self.documents or (0, 0))]


CAUSAL, FULL = Mask(), Mask(right=None)
#: In window sizes as they are given: as far as there are tokens.
NO_LIMIT = -1


def window_mask(window: Sequence[int], causal: bool) -> Mask:
    """The mask of a window size (left, right); right counts as 0 in a causal one."""
    left, right = (None if side == NO_LIMIT else side for side in window)
    return Mask(left=left, right=0 if causal else right)


@dataclass(frozen=True)
class Pattern:
    """A mask in chunks: which key chunks each query chunk sees. They are always consecutive.

    Attributes:
        live: by query chunk, the half-open range of key chunks of which it sees anything.
        whole: by query chunk, those of which every query sees every key; empty where there is none.
    """

    live: tuple[tuple[int, int], ...]
    whole: tuple[tuple[int, int], ...]

    @property
    def is_sparse(self) -> bool:
        """Whether less is live than the causal triangle, chunk by chunk: something need not be sent."""
        return any(first > 0 or end <= chunk for chunk, (first, end) in enumerate(self.live))


def pattern_of(mask: Mask, cp_size: int, size: int) -> Pattern | None:
    """A mask in chunks of ``size`` tokens; None for the causal triangle and for everything, which need no tokens."""
    if mask.is_plain:
        return None
    found = [_row(mask, chunk, cp_size, size) for chunk in range(2 * cp_size)]
    return Pattern(tuple(live for live, _ in found), tuple(whole for _, whole in found))


def _row(mask: Mask, chunk: int, cp_size: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(live, whole) of one query chunk."""
    ranges = []
    segments = list(mask.segments(chunk, cp_size, size))
    for segment in segments:
        if mask.cuts_documents:
            start, piece, end = 0, segment.length, 2 * cp_size * segment.length
            position = segment.position
        else:
            ends = mask.documents or (0, 2 * cp_size * size)
            start, end, piece = ends[segment.document], ends[segment.document + 1], size
            position = start + segment.position
        last = position + segment.length - 1
        sees = max(start, position - mask.left) if mask.left is not None else start
        until = min(end, last + mask.right + 1) if mask.right is not None else end
        every = max(start, last - mask.left) if mask.left is not None else start
        every_until = min(end, position + mask.right + 1) if mask.right is not None else end
        ranges.append(((sees // piece, -(-until // piece)), (-(-every // piece), every_until // piece)))
    if not ranges:
        return (0, 0), (0, 0)
    live = min(first for (first, _), _ in ranges), max(end for (_, end), _ in ranges)
    whole = ranges[0][1] if segments[0].length == size else (0, 0)
    return live, whole if whole[0] < whole[1] else (0, 0)
