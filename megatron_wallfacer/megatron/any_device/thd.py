"""Packed sequences: the one function of Transformer Engine that Megatron needs to cut a packed batch.

``get_batch_on_this_cp_rank`` (megatron/core/utils.py) asks ``transformer_engine_torch`` which tokens of a packed batch
are a context-parallel rank's, and finds ``tex = None`` where Transformer Engine is not installed.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from megatron_wallfacer.megatron.replace import wrap


def install() -> None:
    """Give Megatron the function, unless Transformer Engine is there."""
    wrap("megatron.core.utils.tex", _complete)


def _complete(tex: Any) -> Any:
    return tex or SimpleNamespace(thd_get_partitioned_indices=partitioned_indices)


def partitioned_indices(cu_seqlens: torch.Tensor, total_tokens: int, world_size: int, rank: int) -> torch.Tensor:
    """Which tokens of a packed batch are a rank's: chunks r and 2P - 1 - r of the 2P chunks of each document.

    Args:
        cu_seqlens: where documents begin and end, ``[documents + 1]``; a boundary may be repeated.
        total_tokens: of the batch.
        world_size: P.
        rank: r.

    Returns:
        Indices in ascending order, ``[total_tokens / P]``, int32 as TransformerEngine's, on the device of `cu_seqlens`.

    Raises:
        ValueError: a document cannot be cut, or they do not fill the batch.
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
