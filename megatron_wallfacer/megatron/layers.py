"""Whether every attention layer of a built model is the plugin's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.core_attention import WallfacerCoreAttention


@dataclass(frozen=True)
class LayerCount:
    """Attention layers on one rank: ``ours`` of ``total``, and what the others are."""

    ours: int
    total: int
    others: tuple[str, ...]


def count_layers(model: Iterable[nn.Module]) -> LayerCount:
    """Count the attention layers of a rank's model chunks.

    An attention layer is a module with a ``core_attention``, or what a transformer layer has as
    ``self_attention`` or ``cross_attention`` without one.
    """
    kinds: dict[int, str] = {}
    for chunk in model:
        for module in chunk.modules():
            for name in ("core_attention", "self_attention", "cross_attention"):
                layer = getattr(module, name, None)
                if isinstance(layer, nn.Module) and not _is_nothing(layer) and not hasattr(layer, "core_attention"):
                    kinds[id(layer)] = "" if isinstance(layer, WallfacerCoreAttention) else type(layer).__name__
    others = tuple(sorted(kind for kind in kinds.values() if kind))
    return LayerCount(len(kinds) - len(others), len(kinds), others)


def check_layers(counts: Iterable[LayerCount], pipelines: int) -> str:
    """The line to print once the model is built.

    Args:
        counts: of every rank.
        pipelines: how many ranks hold the same layers.

    Raises:
        WallfacerError: there is an attention layer that is not ours, or no attention layer at all.
    """
    counts = list(counts)
    others = sorted({kind for count in counts for kind in count.others})
    # Counted per copy only for the message: a single foreign layer on a single rank is enough to stop.
    ours, total = (sum(getattr(count, name) for count in counts) // pipelines for name in ("ours", "total"))
    if total > 0 and not others:
        return f"wallfacer: {ours} of {total} attention layers"
    raise WallfacerError(
        f"--wallfacer-cp-size reaches {ours} of {total} attention layers, not {', '.join(others) or 'a single one'}: "
        "every attention layer must be built from Megatron's GPT layer specs"
    )


def gather_counts(count: LayerCount) -> list[LayerCount]:
    """Everyone's count; collective over the world."""
    counts = [count] * dist.get_world_size()
    dist.all_gather_object(counts, count)
    return counts


def _is_nothing(layer: nn.Module) -> bool:
    return type(layer).__name__ in ("IdentityOp", "Identity")
