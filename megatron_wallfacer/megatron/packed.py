"""Packed sequences: where documents begin and end, read from what Megatron hands to attention with each batch."""

from __future__ import annotations

import argparse
import copy
import weakref
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.schedule.mask import Mask

ShardMode = Literal["sequence", "per_document"]
#: Attributes by which versions of Megatron name how tokens are split over context-parallel ranks.
LAYOUT_NAMES = ("cp_partition_mode", "attention_cp_layout")


def shards_whole_sequence(args: argparse.Namespace) -> bool:
    """Whether Megatron packs documents and divides their sequence as a whole into 2P chunks.

    ``pretrain_gpt.py`` does with --dataloader-inter-document-masking, unless --sft is given too. All other packed
    batches have each document divided, as TransformerEngine's attention expects it.
    """
    return getattr(args, "dataloader_inter_document_masking", False) and not getattr(args, "sft", False)


class Batch(NamedTuple):
    """What a packed batch consists of.

    Attributes:
        documents: where they begin and end in the sequence; None where a single one fills it.
        padded: whether there may be padding at the end of a document.
    """

    documents: tuple[int, ...] | None
    padded: bool


class Documents:
    """The documents of a batch, read once however many layers ask: reading waits for the device.

    Args:
        cp_size: P.
        shard_mode: layout of documents, one of :data:`megatron_wallfacer.schedule.mask.SHARD_MODES`.
    """

    def __init__(self, cp_size: int, shard_mode: ShardMode) -> None:
        # Without context parallelism nothing is divided, and Megatron does not pad documents to an even length.
        self._cp_size, self.shard_mode = cp_size, shard_mode if cp_size > 1 else "sequence"
        # What was read last. By identity: a tensor's content cannot be compared without waiting for the device.
        self._boundaries: weakref.ref[Tensor] | None = None
        self._version = 0
        self._documents: tuple[int, ...] = ()
        self._masks: dict[Mask, Mask] = {}

    def read(self, packed: Any, tokens: int, where: str) -> Batch:
        """The documents of a packed batch.

        Args:
            packed: Megatron's PackedSeqParams.
            tokens: of this rank.
            where: the layer, for messages.

        Raises:
            WallfacerError: what ``packed`` describes is not supported.
        """
        ends = _boundaries(packed)
        known = None if self._boundaries is None else self._boundaries()
        if known is not ends or self._version != ends._version:
            self._documents = self._read(packed, ends, tokens, where)
            self._boundaries, self._version = weakref.ref(ends), ends._version
            self._masks.clear()
        return Batch(self._documents if len(self._documents) > 2 else None, _has_padding(packed))

    def mask(self, of_layer: Mask, documents: tuple[int, ...]) -> Mask:
        """Return a layer's mask within documents: one object for all layers of a batch that have the same mask.

        Args:
            of_layer: mask of each document.
            documents: boundaries that :meth:`read` returned last.
        """
        if of_layer not in self._masks:
            self._masks[of_layer] = replace(of_layer, documents=documents, shard_mode=self.shard_mode)
        return self._masks[of_layer]

    def _read(self, packed: Any, boundaries: Tensor, tokens: int, where: str) -> tuple[int, ...]:
        # An empty document, where a boundary is repeated, has no tokens to mask.
        documents = tuple(dict.fromkeys(boundaries.tolist()))
        others = getattr(packed, f"cu_seqlens_kv{_suffix(packed)}", None)
        if others is not None and others is not boundaries and tuple(dict.fromkeys(others.tolist())) != documents:
            raise WallfacerError(f"{where}: --wallfacer-cp-size needs the same documents in queries and keys")
        try:
            Mask(documents=documents, shard_mode=self.shard_mode).check(self._cp_size, tokens * self._cp_size)
        except OptionError as error:
            raise WallfacerError(f"{where}: {error.option} {error.value}: must be {error.allowed}") from error
        return documents


def as_laid_out(packed: Any) -> Any:
    """Return a batch's description whose boundaries are those in memory: of documents with their padding.

    Args:
        packed: Megatron's PackedSeqParams.

    Returns:
        A copy with ``cu_seqlens_q`` as its padded twin, or ``packed`` where it has none.
    """
    padded = getattr(packed, "cu_seqlens_q_padded", None)
    if padded is None or padded is packed.cu_seqlens_q:
        return packed
    packed = copy.copy(packed)
    packed.cu_seqlens_q = padded
    return packed


def _boundaries(packed: Any) -> Tensor:
    """Return where documents begin and end in the sequence in memory, with their padding."""
    return getattr(packed, f"cu_seqlens_q{_suffix(packed)}")


def _suffix(packed: Any) -> str:
    return "" if getattr(packed, "cu_seqlens_q_padded", None) is None else "_padded"


def _has_padding(packed: Any) -> bool:
    """Whether there may be padding: both kinds of boundaries are given, and not as one tensor."""
    padded = getattr(packed, "cu_seqlens_q_padded", None)
    return padded is not None and padded is not packed.cu_seqlens_q
