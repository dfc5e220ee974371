"""Masks: the keys that each query sees, in tokens and in chunks.

The queries of a packed sequence see only keys of their own document. With a sliding window, a query sees no key beyond
a given distance. Packed sequences have two layouts. With ``sequence`` the whole sequence is divided into 2P equal
chunks, so chunks may begin inside documents (Megatron's ``--dataloader-inter-document-masking``). With ``per_document``
each document is divided into 2P chunks, and chunk c of the sequence consists of the chunks c of all documents
(Megatron's ``--sft``, TransformerEngine's thd).
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

#: Half-open range of chunk ids, or of tokens.
Range = tuple[int, int]
#: Layouts of documents. The whole sequence or each document is divided into 2P chunks.
SHARD_MODES = ("sequence", "per_document")


@dataclass(frozen=True)
class Mask:
    """A set of unmasked (query, key) pairs.

    A subclass for a new kind of mask overrides :meth:`calls`, :meth:`key_chunks` and :attr:`is_plain`.

    Attributes:
        left: number of earlier keys that a query sees; None for no limit.
        right: number of later keys that a query sees; None for no limit, 0 for a causal mask.
        documents: boundaries of the documents in the sequence, ascending from 0; None for a single document. Tokens
            after the last document (padding) see no key, and no query sees them.
        shard_mode: layout of documents, one of :data:`SHARD_MODES`.

    Raises:
        OptionError: A window size is negative, or boundaries do not ascend from 0.
    """

    left: int | None = None
    right: int | None = 0
    documents: tuple[int, ...] | None = None
    shard_mode: Literal["sequence", "per_document"] = "sequence"

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
        # Computed once, because a sequence may have 65,536 documents, and each layer looks up passes by its mask.
        return hash((self.left, self.right, self.documents, self.shard_mode))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Return the lengths of the documents in tokens."""
        return tuple(end - start for start, end in pairwise(self.documents or ()))

    @property
    def nbytes(self) -> int:
        """Return the approximate bytes of host memory that boundaries and lengths of documents need."""
        return 72 * len(self.documents or ())

    @property
    def is_plain(self) -> bool:
        """Return whether the mask has one document and no window, so that it is the causal triangle or full."""
        return self.documents is None and not self.has_window

    @property
    def has_window(self) -> bool:
        """Return whether the mask has a sliding window: a left limit, or a right limit above 0."""
        return self.left is not None or self.right not in (0, None)

    @property
    def is_per_document(self) -> bool:
        """Return whether each document is divided into 2P chunks, instead of the whole sequence."""
        return self.shard_mode == "per_document" and self.documents is not None

    @property
    def reorders(self) -> bool:
        """Return whether local rows must be reordered, so that the rank's two chunks follow each other."""
        return self.documents is not None and self.shard_mode == "per_document" and len(self.documents) > 2

    def check(self, cp_size: int, tokens: int) -> None:
        """Check that the documents fit a sequence of ``tokens``, and call :meth:`check_lengths`.

        Raises:
            OptionError: The boundaries exceed the sequence, or 2P does not divide a length.
        """
        if self.documents is None:
            return
        end = self.documents[-1]
        if end > tokens or (end < tokens and self.shard_mode == "per_document"):
            most = "" if self.shard_mode == "per_document" else "at most "
            allowed = f"a list that ends with {most}{tokens}, the number of tokens on all ranks"
            raise OptionError("cu_seqlens", f"[..., {end}]", allowed)
        self.check_lengths(cp_size)

    def check_lengths(self, cp_size: int) -> None:
        """Check that each document can be divided into 2P chunks, if the layout is ``per_document``.

        Raises:
            OptionError: The length of a document is not a multiple of 2P.
        """
        if not self.is_per_document:
            return
        for length in self.lengths:
            if length % (2 * cp_size):
                padded = f"padded to multiples of 2P = {2 * cp_size}"
                raise OptionError("cu_seqlens", f"with a document of {length} tokens", padded)

    @cached_property
    def shortest(self) -> int:
        """Return the length of the shortest document in tokens."""
        return min(self.lengths)

    def boundaries(self, chunk: int, cp_size: int, size: int) -> tuple[int, ...]:
        """Return the boundaries of the documents in a chunk of ``size`` tokens, ascending from 0."""
        if self.is_per_document:
            return tuple(accumulate((length // (2 * cp_size) for length in self.lengths), initial=0))
        first, end = chunk * size, (chunk + 1) * size
        ends = self.documents or (0, 2 * cp_size * size)
        documents = overlapping(ends, first, end)
        return (0, *(min(end, ends[document + 1]) - first for document in documents))

    def calls(self, q_chunks: Sequence[int], k_chunks: Sequence[int], cp_size: int, size: int) -> tuple[AttnTile, ...]:
        """Return tiles that cover every unmasked pair of the given query and key chunks exactly once.

        Each row and each column of a tile has an unmasked pair.

        Args:
            q_chunks: chunk ids of the query rows, in the order of the rows.
            k_chunks: chunk ids of the key columns, in the order of the columns.
            cp_size: P, the number of context-parallel ranks.
            size: tokens of a chunk.
        """
        return tuple(calls_of(self, q_chunks, k_chunks, cp_size, size))

    def key_chunks(self, chunk: int, cp_size: int, size: int) -> tuple[Range, Range]:
        """Return the key chunks that a query chunk sees, and those without masked pairs, as half-open ranges.

        An empty range is (0, 0).
        """
        if self.is_per_document:
            # The window covers the most chunks in the shortest document.
            piece = self.shortest // (2 * cp_size)
            nonempty, full = self._key_chunks((chunk * piece, (chunk + 1) * piece), (0, 2 * cp_size * piece), piece)
            return nonempty, full if piece == size else (0, 0)
        first, end = chunk * size, (chunk + 1) * size
        ends = self.documents or (0, 2 * cp_size * size)
        documents = overlapping(ends, first, end)
        if not documents:
            return (0, 0), (0, 0)
        # The keys that a query sees ascend with its position, so the first and the last document of the chunk decide.
        (first_nonempty, full), (last_nonempty, _) = (
            self._key_chunks((max(first, start), min(end, stop)), (start, stop), size)
            for start, stop in (ends[document : document + 2] for document in (documents[0], documents[-1]))
        )
        is_one_document = ends[documents[0]] <= first and end <= ends[documents[0] + 1]
        return (first_nonempty[0], last_nonempty[1]), full if is_one_document else (0, 0)

    def _key_chunks(self, queries: Range, document: Range, size: int) -> tuple[Range, Range]:
        """Return two ranges of key chunks: those that at least one query sees, and those that all queries see in full.

        ``queries`` and ``document`` are half-open ranges of positions. Chunk 0 begins at position 0.
        """
        (first, last), (start, end) = (queries[0], queries[1] - 1), document
        some_from = start if self.left is None else max(start, first - self.left)
        some_until = end if self.right is None else min(end, last + self.right + 1)
        every_from = start if self.left is None else max(start, last - self.left)
        every_until = end if self.right is None else min(end, first + self.right + 1)
        full = -(-every_from // size), every_until // size
        return (some_from // size, -(-some_until // size)), full if full[0] < full[1] else (0, 0)


CAUSAL, FULL = Mask(), Mask(right=None)
#: Value of a window size that means no limit.
NO_LIMIT = -1


def window_mask(window: Sequence[int], causal: bool) -> Mask:
    """Return the mask of a sliding window (left, right). With ``causal`` a query sees no later key."""
    left, right = (None if side == NO_LIMIT else side for side in window)
    return Mask(left=left, right=0 if causal else right)


@dataclass(frozen=True)
class ChunkMask:
    """A mask in units of chunks. The key chunks that a query chunk sees are consecutive.

    Attributes:
        nonempty: for each query chunk, half-open range of the key chunks that it sees.
        full: for each query chunk, half-open range of the key chunks that it sees without masked pairs; (0, 0) for
            none.
    """

    nonempty: tuple[Range, ...]
    full: tuple[Range, ...]

    @property
    def is_sparse(self) -> bool:
        """Return whether at least one chunk pair on or below the causal diagonal is fully masked."""
        return any(first > 0 or end <= chunk for chunk, (first, end) in enumerate(self.nonempty))


def chunk_mask_of(mask: Mask, cp_size: int, size: int) -> ChunkMask | None:
    """Return a mask in units of chunks of ``size`` tokens; None for the causal triangle and for full attention."""
    if mask.is_plain:
        return None
    rows = [mask.key_chunks(chunk, cp_size, size) for chunk in range(2 * cp_size)]
    return ChunkMask(tuple(nonempty for nonempty, _ in rows), tuple(full for _, full in rows))
