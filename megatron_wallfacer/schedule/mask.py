"""Masks: which key a query may see, and what kernel calls that makes of a block of pairs.

Documents of a packed sequence do not see each other. A window limits how far a query sees. Both are decided from
positions alone. Two layouts of packed sequences exist: ``sequence`` cuts the whole sequence into 2P chunks wherever the
documents end (Megatron's ``--dataloader-inter-document-masking``), ``document`` cuts each document into 2P chunks, and
chunk c of the sequence is what all documents' chunks c make (Megatron's ``--sft``, TransformerEngine's thd).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.calls import calls_of, overlapping

#: What can be cut into 2P chunks: the whole sequence, or each document.
CUTS = ("sequence", "document")


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

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Computed once: a sequence may hold 65,536 documents, and each layer looks up its passes by its mask.
        return hash((self.left, self.right, self.documents, self.cut))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        return tuple(end - start for start, end in pairwise(self.documents or ()))

    @property
    def nbytes(self) -> int:
        """Bytes of host memory, about: boundaries and lengths of documents, 36 bytes each."""
        return 72 * len(self.documents or ())

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
        for length in self.lengths:
            if length % (2 * cp_size):
                padded = f"padded to multiples of 2P = {2 * cp_size}"
                raise OptionError("cu_seqlens", f"with a document of {length} tokens", padded)

    @cached_property
    def shortest(self) -> int:
        """Tokens of the shortest document."""
        return min(self.lengths)

    def boundaries(self, chunk: int, cp_size: int, size: int) -> tuple[int, ...]:
        """Return where the documents of a chunk begin and end in it, from 0 on.

        Args:
            chunk: its id.
            cp_size: P.
            size: tokens of a chunk.
        """
        if self.cuts_documents:
            return tuple(accumulate((length // (2 * cp_size) for length in self.lengths), initial=0))
        first, end = chunk * size, (chunk + 1) * size
        ends = self.documents or (0, 2 * cp_size * size)
        documents = overlapping(ends, first, end)
        return (0, *(min(end, ends[document + 1]) - first for document in documents))

    def calls(self, q_chunks: Sequence[int], k_chunks: Sequence[int], cp_size: int, size: int) -> tuple[AttnTile, ...]:
        """Return tiles that cover each unmasked pair of some query chunks and some key chunks exactly once.

        Each row and each column of a tile has an unmasked pair.

        Args:
            q_chunks, k_chunks: ids, of the rows and the columns in their order.
            cp_size: P.
            size: tokens of a chunk.
        """
        return tuple(calls_of(self, q_chunks, k_chunks, cp_size, size))


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
    if mask.cuts_documents:
        # The shortest document has the most chunks within its window.
        piece = mask.shortest // (2 * cp_size)
        live, whole = _key_chunks(mask, (chunk * piece, (chunk + 1) * piece), (0, 2 * cp_size * piece), piece)
        return live, whole if piece == size else (0, 0)
    first, end = chunk * size, (chunk + 1) * size
    ends = mask.documents or (0, 2 * cp_size * size)
    documents = overlapping(ends, first, end)
    if not documents:
        return (0, 0), (0, 0)
    # What queries see ascends with their place: the first and the last document of the chunk decide.
    ranges = []
    for document in (documents[0], documents[-1]):
        start, stop = ends[document], ends[document + 1]
        ranges.append(_key_chunks(mask, (max(first, start), min(end, stop)), (start, stop), size))
    (first_live, whole), (last_live, _) = ranges
    filled = ends[documents[0]] <= first and end <= ends[documents[0] + 1]
    return (first_live[0], last_live[1]), whole if filled else (0, 0)


def _key_chunks(
    mask: Mask, queries: tuple[int, int], document: tuple[int, int], size: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Key chunks of which some query sees any key, and of which every query sees every key; in tokens from chunk 0.

    Args:
        mask: windows.
        queries: half-open range of positions in one document.
        document: half-open range of positions.
        size: tokens of a chunk.
    """
    (first, last), (start, end) = (queries[0], queries[1] - 1), document
    sees = start if mask.left is None else max(start, first - mask.left)
    until = end if mask.right is None else min(end, last + mask.right + 1)
    every = start if mask.left is None else max(start, last - mask.left)
    every_until = end if mask.right is None else min(end, first + mask.right + 1)
    whole = -(-every // size), every_until // size
    return (sees // size, -(-until // size)), whole if whole[0] < whole[1] else (0, 0)
