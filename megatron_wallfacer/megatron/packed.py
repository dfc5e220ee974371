"""Read the boundaries of packed documents from the arguments that Megatron passes to attention."""

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
#: Names in Megatron releases of the attribute that describes how tokens are split over context-parallel ranks.
LAYOUT_NAMES = ("cp_partition_mode", "attention_cp_layout")


def shards_whole_sequence(args: argparse.Namespace) -> bool:
    """Return whether Megatron packs documents and splits the sequence, not each document, into 2P chunks.

    ``pretrain_gpt.py`` splits the sequence if --dataloader-inter-document-masking is given without --sft. For other
    packed batches Megatron splits each document.
    """
    return getattr(args, "dataloader_inter_document_masking", False) and not getattr(args, "sft", False)


class Batch(NamedTuple):
    """Documents of a packed batch.

    Attributes:
        documents: boundaries of the documents in the sequence, or None if one document fills the sequence.
        padded: whether a document may end with padding.
    """

    documents: tuple[int, ...] | None
    padded: bool


class Documents:
    """Reader of document boundaries that reads once per batch for all layers, because reading waits for the device.

    Args:
        cp_size: P, the number of context-parallel ranks.
        shard_mode: layout of documents, one of :data:`megatron_wallfacer.schedule.mask.SHARD_MODES`.
    """

    def __init__(self, cp_size: int, shard_mode: ShardMode) -> None:
        # Without context parallelism Megatron does not pad documents to a multiple of 2P tokens.
        self._cp_size, self.shard_mode = cp_size, shard_mode if cp_size > 1 else "sequence"
        # Boundaries that were read last, compared by identity: comparing contents would wait for the device.
        self._boundaries: weakref.ref[Tensor] | None = None
        self._version = 0
        self._documents: tuple[int, ...] = ()
        self._masks: dict[Mask, Mask] = {}

    def read(self, packed: Any, tokens: int, where: str) -> Batch:
        """Return the documents of a packed batch.

        Args:
            packed: Megatron's PackedSeqParams.
            tokens: number of tokens of this rank.
            where: name of the layer, for error messages.

        Raises:
            WallfacerError: The boundaries are not supported.
        """
        ends = _boundaries(packed)
        known = None if self._boundaries is None else self._boundaries()
        if known is not ends or self._version != ends._version:
            self._documents = self._read(packed, ends, tokens, where)
            self._boundaries, self._version = weakref.ref(ends), ends._version
            self._masks.clear()
        return Batch(self._documents if len(self._documents) > 2 else None, ends is not packed.cu_seqlens_q)

    def mask(self, of_layer: Mask, documents: tuple[int, ...]) -> Mask:
        """Return a layer's mask, limited to documents. Layers with equal masks share one :class:`Mask` per batch.

        Args:
            of_layer: mask that applies inside each document.
            documents: boundaries that the last call of :meth:`read` returned.
        """
        if of_layer not in self._masks:
            self._masks[of_layer] = replace(of_layer, documents=documents, shard_mode=self.shard_mode)
        return self._masks[of_layer]

    def _read(self, packed: Any, boundaries: Tensor, tokens: int, where: str) -> tuple[int, ...]:
        # A repeated boundary is an empty document, which does not affect the mask.
        documents = tuple(dict.fromkeys(boundaries.tolist()))
        others = _boundaries(packed, "kv")
        if others is not None and others is not boundaries and tuple(dict.fromkeys(others.tolist())) != documents:
            raise WallfacerError(f"{where}: --wallfacer-cp-size needs the same documents in queries and keys")
        try:
            Mask(documents=documents, shard_mode=self.shard_mode).check(self._cp_size, tokens * self._cp_size)
        except OptionError as error:
            raise WallfacerError(f"{where}: {error.option} {error.value}: must be {error.allowed}") from error
        return documents


def as_laid_out(packed: Any) -> Any:
    """Return PackedSeqParams whose ``cu_seqlens_q`` includes the padding of documents: ``packed`` itself, or a copy."""
    boundaries = _boundaries(packed)
    if boundaries is packed.cu_seqlens_q:
        return packed
    packed = copy.copy(packed)
    packed.cu_seqlens_q = boundaries
    return packed


def _boundaries(packed: Any, tensor: Literal["q", "kv"] = "q") -> Any:
    suffix = "" if getattr(packed, "cu_seqlens_q_padded", None) is None else "_padded"
    return getattr(packed, f"cu_seqlens_{tensor}{suffix}", None)
