"""For --spec: GPT layer specs whose attention does not come from Megatron's spec provider."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention


class ForeignAttention(torch.nn.Module):
    """Somebody else's core attention: runs, and knows nothing of context parallelism."""

    def __init__(self, **_: object) -> None:
        super().__init__()

    def forward(self, query: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return query.flatten(2)


spec = get_gpt_layer_local_spec(normalization="RMSNorm")
spec.submodules.self_attention.submodules.core_attention = ForeignAttention

#: Names Megatron's own attention, which rejects context parallelism.
named = get_gpt_layer_local_spec(normalization="RMSNorm")
named.submodules.self_attention.submodules.core_attention = DotProductAttention
