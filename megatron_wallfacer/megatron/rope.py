"""Rotary positions of packed tokens where the whole sequence, and not each document, is cut over the ranks.

With ``--dataloader-inter-document-masking`` Megatron cuts the sequence into 2P chunks wherever its documents end, but
its rotary embedding for packed sequences takes the tokens for those of a cut through each document: with
context parallelism it stops, or from Megatron 0.20 on turns by wrong angles in silence. Here every token gets the angle
of its position in its document.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.schedule.layout import shard_chunks


def positions_in_documents(cu_seqlens: Tensor, tokens: int, rank: int, cp_size: int) -> Tensor:
    """Return the position of each token of a rank in its document.

    Args:
        cu_seqlens: boundaries of the documents in the whole sequence, from 0; a boundary may be repeated.
        tokens: number of tokens of the rank.
        rank: index in the context-parallel group.
        cp_size: P, the number of context-parallel ranks.

    Returns:
        ``[tokens]``, int64.
    """
    size = tokens // 2
    chunks = [
        torch.arange(chunk * size, (chunk + 1) * size, device=cu_seqlens.device)
        for chunk in shard_chunks(rank, cp_size)
    ]
    position = torch.cat(chunks)
    starts = cu_seqlens.to(torch.int64)
    return position - starts[torch.searchsorted(starts, position, right=True) - 1]


class _Alone:
    """A context-parallel group of one, as far as a rotary embedding asks."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def rotate_by_document(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Megatron's ``_apply_rotary_pos_emb_thd``, for a sequence that is cut as a whole."""

    def _apply_rotary_pos_emb_thd(
        t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *args: Any, cp_group: Any = None, **kwargs: Any
    ) -> Tensor:
        if cp_group is None or cp_group.size() == 1:
            return original(t, cu_seqlens, freqs, *args, cp_group=cp_group, **kwargs)
        picked = freqs[positions_in_documents(cu_seqlens, t.shape[0], cp_group.rank(), cp_group.size())]
        # With the angles picked, these tokens are one document, all of it here.
        whole = cu_seqlens.new_tensor([0, t.shape[0]])
        return original(t, whole, picked, *args, cp_group=_Alone(), **kwargs)

    return _apply_rotary_pos_emb_thd
