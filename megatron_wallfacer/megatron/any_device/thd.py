"""Split packed batches over context-parallel ranks if TransformerEngine is not installed.

``get_batch_on_this_cp_rank`` (megatron/core/utils.py) calls ``transformer_engine_torch`` for the token indices of a
context-parallel rank. Without TransformerEngine Megatron has ``tex = None`` in place of ``transformer_engine_torch``.
This module supplies the function ``thd_get_partitioned_indices`` of ``tex``.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from megatron_wallfacer.megatron.replace import wrap


def install() -> None:
    """Add ``thd_get_partitioned_indices`` to Megatron's ``tex`` unless TransformerEngine is installed."""
    wrap("megatron.core.utils:tex", _complete)


def _complete(tex: Any) -> Any:
    return tex or SimpleNamespace(thd_get_partitioned_indices=partitioned_indices)


def partitioned_indices(cu_seqlens: torch.Tensor, total_tokens: int, world_size: int, rank: int) -> torch.Tensor:
    """Return the token indices of a rank in a packed batch: chunks r and 2P - 1 - r of the 2P chunks of each document.

    Args:
        cu_seqlens: document boundaries, ``[documents + 1]``. Repeated boundaries are allowed.
        total_tokens: number of tokens of the batch.
        world_size: P, the number of context-parallel ranks.
        rank: r, the index of the rank.

    Returns:
        Ascending indices ``[total_tokens / P]``, int32 like TransformerEngine's, on the device of `cu_seqlens`.

    Raises:
        ValueError: A document does not divide into 2P chunks, or the documents do not fill the batch.
    """
    ends = cu_seqlens.tolist()
    if ends[-1] != total_tokens:
        raise ValueError(f"the documents end at {ends[-1]}, the batch has {total_tokens} tokens")
    pieces = []
    for start, end in pairwise(ends):
        size, rest = divmod(end - start, 2 * world_size)
        if rest:
            raise ValueError(f"a document of {end - start} tokens cannot be cut into {2 * world_size} chunks")
        for chunk in (rank, 2 * world_size - 1 - rank):
            pieces.append(torch.arange(start + chunk * size, start + (chunk + 1) * size, dtype=torch.int32))
    return torch.cat(pieces).to(cu_seqlens.device)
