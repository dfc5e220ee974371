"""Count the attention layers of a built model that use the plugin, and the layers that use Megatron's own attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.core_attention import WallfacerCoreAttention
from megatron_wallfacer.megatron.layer_selection import FLAG, is_megatrons


@dataclass(frozen=True)
class LayerCount:
    """Number of attention layers on one rank.

    Attributes:
        ours: number of layers whose attention the plugin computes.
        total: number of attention layers.
        others: sorted class names of attention modules that are not the plugin's, although they should be.
        megatrons: sorted class names of attention modules that ``--wallfacer-layers`` leaves to Megatron.
    """

    ours: int
    total: int
    others: tuple[str, ...]
    megatrons: tuple[str, ...] = ()


def count_layers(model: Iterable[nn.Module]) -> LayerCount:
    """Count the attention layers of a rank's model chunks.

    The ``core_attention`` of a module is an attention layer. A ``self_attention`` or ``cross_attention`` module
    without a ``core_attention`` is an attention layer too.
    """
    found: dict[int, nn.Module] = {}
    for chunk in model:
        for module in chunk.modules():
            for name in ("core_attention", "self_attention", "cross_attention"):
                layer = getattr(module, name, None)
                nothing = type(layer).__name__ in ("IdentityOp", "Identity")
                if isinstance(layer, nn.Module) and not nothing and not hasattr(layer, "core_attention"):
                    found[id(layer)] = layer
    foreign = [layer for layer in found.values() if not isinstance(layer, WallfacerCoreAttention)]
    megatrons, others = (
        tuple(sorted(type(layer).__name__ for layer in foreign if is_megatrons(layer) == marked))
        for marked in (True, False)
    )
    return LayerCount(len(found) - len(foreign), len(found), others, megatrons)


def check_layers(counts: Iterable[LayerCount], pipelines: int) -> str:
    """Check that the plugin computes every attention layer except those that ``--wallfacer-layers`` leaves to Megatron.

    Args:
        counts: number of layers on each rank.
        pipelines: number of pipelines in the job. Each pipeline has the whole model.

    Returns:
        The line to print after the model is built.

    Raises:
        WallfacerError: An attention layer is not the plugin's, or there is no attention layer.
    """
    counts = list(counts)
    others = sorted({kind for count in counts for kind in count.others})
    # The division is only for the message: one wrong layer on one rank is an error.
    ours, total = (sum(getattr(count, name) for count in counts) // pipelines for name in ("ours", "total"))
    if ours > 0 and not others:
        megatrons = sorted({kind for count in counts for kind in count.megatrons})
        rest = f"; {FLAG} leaves the others to Megatron's {', '.join(megatrons)}" if megatrons else ""
        return f"wallfacer: {ours} of {total} attention layers{rest}"
    other = f", but not {', '.join(others)}" if others else ""
    raise WallfacerError(
        f"--wallfacer-cp-size: the plugin computes {ours} of {total} attention layers{other}: "
        "every attention layer must be built from Megatron's GPT layer specs"
    )


@contextmanager
def advice_of_the_plugin() -> Iterator[None]:
    """While a model is built, replace Megatron's assertions about classes of attention by errors of the plugin.

    Raises:
        WallfacerError: The script or its layer spec accepts only Megatron's own attention classes.
    """
    try:
        yield
    except AssertionError as error:
        # DotProductAttention of megatron.core, and models that require TEDotProductAttention (LLaVA).
        if "DotProductAttention" not in str(error):
            raise
        raise WallfacerError(
            "--wallfacer-cp-size: must be left out, because the model's script, or --spec, requires an attention class "
            "of Megatron by name; the plugin replaces only layers that are built from Megatron's GPT layer specs"
        ) from error
