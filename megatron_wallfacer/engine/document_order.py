"""The order of the rows of a rank in packed sequences, if each document is divided into chunks.

Megatron and TransformerEngine order rows by document, and in each document the low chunk before the high one. A
schedule orders rows by chunk of the sequence: the low chunks of all documents, then their high chunks.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from megatron_wallfacer.schedule.mask import Mask


def chunk_order(x: Tensor, mask: Mask, cp_size: int) -> Tensor:
    """Return rows that are ordered by document in the order of the schedule: the same one if the sequence is divided.

    Args:
        x: rows ``[tokens / P, ...]`` of a shard.
        mask: documents and their layout.
        cp_size: P, the number of context-parallel ranks.
    """
    if not mask.reorders:
        return x
    halves = _halves(mask, cp_size)
    return torch.cat([piece for half in (0, 1) for piece in x.split(halves)[half::2]])


def document_order(x: Tensor, mask: Mask, cp_size: int) -> Tensor:
    """Return rows in the order of documents: the inverse of :func:`chunk_order`."""
    if not mask.reorders:
        return x
    halves = _halves(mask, cp_size)
    ends = list(accumulate(halves[::2], initial=0))
    low, high = x.split([ends[-1], ends[-1]])
    return torch.cat([half[start:end] for start, end in pairwise(ends) for half in (low, high)])


def _halves(mask: Mask, cp_size: int) -> list[int]:
    """Return the number of rows of the low and the high chunk of each document, alternately."""
    return [(end - start) // (2 * cp_size) for start, end in pairwise(mask.documents or ()) for _ in range(2)]
