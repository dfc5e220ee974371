"""Compute rotary positions of packed tokens if the whole sequence, and not each document, is split over the ranks.

With ``--dataloader-inter-document-masking`` Megatron splits the sequence into 2P chunks regardless of document
boundaries. Megatron's rotary embedding for packed sequences assumes that each document is split. With context
parallelism Megatron's rotary embedding raises an error or, from Megatron 0.20 on, rotates by wrong angles without an
error. This module gives each token the angle of its position in its document.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import ROTARY_LAYOUT
from megatron_wallfacer.schedule.layout import shard_chunks


def positions_in_documents(cu_seqlens: Tensor, tokens: int, rank: int, cp_size: int) -> Tensor:
    """Return the position of each token of a rank, counted from the start of the token's document.

    Args:
        cu_seqlens: boundaries of the documents in the whole sequence, starting with 0. Repeated boundaries are allowed.
        tokens: number of tokens of the rank.
        rank: index of the rank in the context-parallel group.
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
    """Object with the methods of a process group that has one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@partial(
    Hook,
    name="rope of packed sequences",
    purpose="computes rotary positions within documents if the whole sequence is split",
    target="megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_thd",
    since=ROTARY_LAYOUT,
    parameters=("t", "cu_seqlens", "freqs", "cp_group"),
)
def rope_hook(
    state: PluginState,
    original: Callable[..., Tensor],
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    *args: Any,
    cp_group: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Rotate tokens by their positions in documents if the ranks split the sequence without regard to documents."""
    if cp_group is None or cp_group.size() == 1:
        return original(t, cu_seqlens, freqs, *args, cp_group=cp_group, **kwargs)
    picked = freqs[positions_in_documents(cu_seqlens, t.shape[0], cp_group.rank(), cp_group.size())]
    # The selected angles are in the order of the tokens, so the original can handle the tokens as one document.
    whole = cu_seqlens.new_tensor([0, t.shape[0]])
    return original(t, whole, picked, *args, cp_group=_Alone(), **kwargs)
