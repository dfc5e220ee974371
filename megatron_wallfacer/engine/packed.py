"""Packed sequences whose documents are cut one by one: the order in which a rank holds their rows.

Megatron and TransformerEngine hold document after document, of each first the low chunk and then the high one. A
schedule knows chunks of the whole sequence: the low chunks of all documents, then the high ones.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from megatron_wallfacer.schedule.mask import Mask


def chunk_order(x: Tensor, mask: Mask, cp_size: int) -> Tensor:
    """Rows of a shard, document after document, as the schedule knows them. The same where the sequence is cut.

    Args:
        x: ``[tokens / P, ...]``.
        mask: documents and how they are cut.
        cp_size: P.
    """
    if not mask.reorders:
        return x
    halves = _halves(mask, cp_size)
    return torch.cat([piece for half in (0, 1) for piece in x.split(halves)[half::2]])


def document_order(x: Tensor, mask: Mask, cp_size: int) -> Tensor:
    """The inverse of :func:`chunk_order`."""
    if not mask.reorders:
        return x
    halves = _halves(mask, cp_size)
    ends = list(accumulate(halves[::2], initial=0))
    low, high = x.split([ends[-1], ends[-1]])
    return torch.cat([half[start:end] for start, end in pairwise(ends) for half in (low, high)])


def _halves(mask: Mask, cp_size: int) -> list[int]:
    """Rows of each document's low and high chunk, in turns."""
    return [(end - start) // (2 * cp_size) for start, end in pairwise(mask.documents or ()) for _ in range(2)]
