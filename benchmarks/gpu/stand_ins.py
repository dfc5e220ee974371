"""Stand-in for TransformerEngine in a smoke run on a CPU: its context-parallel attention by gathering keys and values.

Names and parameters are those of ``transformer_engine.pytorch.DotProductAttention`` 2.x that the measurements use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


class DotProductAttention(torch.nn.Module):
    """Causal attention over zig-zag shards, bshd."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
    ) -> None:
        super().__init__()
        if (attention_dropout, qkv_format, attn_mask_type) != (0.0, "bshd", "causal"):
            raise NotImplementedError(f"{attention_dropout=}, {qkv_format=}, {attn_mask_type=}")
        self._groups, self._shared = num_gqa_groups or num_attention_heads, num_attention_heads
        self._cp_group: dist.ProcessGroup | None = None

    def set_context_parallel_group(
        self, cp_group: Any, cp_global_ranks: Sequence[int], cp_stream: Any, cp_comm_type: str = "p2p"
    ) -> None:
        if cp_comm_type not in ("p2p", "a2a", "all_gather", "a2a+p2p"):
            raise ValueError(f"Unsupported communication type: {cp_comm_type}!")
        if isinstance(cp_group, list) != (cp_comm_type == "a2a+p2p"):
            raise ValueError(f"cp_group of {cp_comm_type}: {type(cp_group).__name__}")
        self._cp_group = dist.group.WORLD

    def forward(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor) -> Tensor:
        """``[batch, tokens / P, heads * head_dim]``."""
        size, rank = dist.get_world_size(self._cp_group), dist.get_rank(self._cp_group)
        length = query_layer.shape[1] // 2
        positions = [torch.arange(chunk * length, (chunk + 1) * length) for chunk in range(2 * size)]
        order = [torch.cat([positions[one], positions[2 * size - 1 - one]]) for one in range(size)]
        k, v = (torch.cat(all_gather(x.contiguous(), self._cp_group), dim=1) for x in (key_layer, value_layer))
        mask = order[rank][:, None] >= torch.cat(order)[None, :]
        q, k, v = (x.transpose(1, 2) for x in (query_layer, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)
