"""Count the attention layers of a built model: the plugin's, and Megatron's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.core_attention import WallfacerCoreAttention
from megatron_wallfacer.megatron.layer_selection import FLAG, is_megatrons


@dataclass(frozen=True)
class LayerCount:
    """Attention layers on one rank.

    Attributes:
        ours: number of layers whose attention the plugin computes.
        total: number of attention layers.
        others: class names of layers that are neither the plugin's nor marked as Megatron's own, sorted.
        megatrons: class names of layers that ``--wallfacer-layers`` does not select, sorted.
    """

    ours: int
    total: int
    others: tuple[str, ...]
    megatrons: tuple[str, ...] = ()


def count_layers(model: Iterable[nn.Module]) -> LayerCount:
    """Count the attention layers of a rank's model chunks.

    An attention layer is a module with a ``core_attention``, or what a transformer layer has as
    ``self_attention`` or ``cross_attention`` without one.
    """
    found: dict[int, nn.Module] = {}
    for chunk in model:
        for module in chunk.modules():
            for name in ("core_attention", "self_attention", "cross_attention"):
                layer = getattr(module, name, None)
                if isinstance(layer, nn.Module) and not _is_nothing(layer) and not hasattr(layer, "core_attention"):
                    found[id(layer)] = layer
    foreign = [layer for layer in found.values() if not isinstance(layer, WallfacerCoreAttention)]
    megatrons, others = (
        tuple(sorted(type(layer).__name__ for layer in foreign if is_megatrons(layer) == marked))
        for marked in (True, False)
    )
    return LayerCount(len(found) - len(foreign), len(found), others, megatrons)


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
    if ours > 0 and not others:
        megatrons = sorted({kind for count in counts for kind in count.megatrons})
        rest = f"; {FLAG} leaves the others to Megatron's {', '.join(megatrons)}" if megatrons else ""
        return f"wallfacer: {ours} of {total} attention layers{rest}"
    raise WallfacerError(
        f"--wallfacer-cp-size reaches {ours} of {total} attention layers, not {', '.join(others) or 'a single one'}: "
        "every attention layer must be built from Megatron's GPT layer specs"
    )


@contextmanager
def advice_of_the_plugin() -> Iterator[None]:
    """Replace the advice that Megatron gives while it builds a model: its own attention for context parallelism.

    Raises:
        WallfacerError: a layer spec or a script names an attention of Megatron's.
    """
    try:
        yield
    except AssertionError as error:
        # DotProductAttention of megatron.core, and models that require TEDotProductAttention (LLaVA).
        if "DotProductAttention" not in str(error):
            raise
        raise WallfacerError(
            "--wallfacer-cp-size: must be left out here: the model's script, or --spec, requires an attention of "
            "Megatron's by name; the plugin has only layers that are built from Megatron's GPT layer specs"
        ) from error


def gather_counts(count: LayerCount) -> list[LayerCount]:
    """Everyone's count; collective over the world."""
    counts = [count] * dist.get_world_size()
    dist.all_gather_object(counts, count)
    return counts


def _is_nothing(layer: nn.Module) -> bool:
    return type(layer).__name__ in ("IdentityOp", "Identity")
