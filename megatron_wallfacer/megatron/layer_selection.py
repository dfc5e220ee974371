"""Select the layers whose attention the plugin computes: ``--wallfacer-layers``.

Layers that are not selected keep Megatron's own attention, which splits a sequence only with TransformerEngine.
TransformerEngine and the plugin have the same zig-zag layout, so one model can have layers with either attention.
``--cp-comm-type`` applies only to layers with Megatron's own attention.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.lists import numbers_listed
from megatron_wallfacer.megatron.flags import Flags, flag_name
from megatron_wallfacer.megatron.masks import is_window_layer

FLAG = flag_name("layers")
#: Layers without and with a sliding window. ``--window-attn-skip-freq`` gives a window to some layers only.
KINDS = ("full", "window")


@dataclass(frozen=True)
class LayerSelection:
    """Selection of the layers whose attention the plugin computes.

    Attributes:
        text: value of the flag as typed.
        numbers: layer numbers from 1 over all pipeline stages, or None if the flag names a kind of layer.
    """

    text: str
    numbers: frozenset[int] | None

    def includes(self, config: Any, layer_number: int) -> bool:
        """Return whether the plugin computes the attention of a layer."""
        if self.numbers is not None:
            return layer_number in self.numbers
        return is_window_layer(config, layer_number) == (self.text == "window")


def select_layers(args: argparse.Namespace) -> LayerSelection | None:
    """Return the layers that ``--wallfacer-layers`` selects, or None if the plugin computes all layers.

    Raises:
        WallfacerError: The value is neither a kind of layer nor a list of layers of the model.
    """
    text = Flags.of(args).layers
    if text is None:
        return None
    if text in KINDS:
        if getattr(args, "window_size", None) is None:
            raise WallfacerError(f"{FLAG} {text}: needs --window-size LEFT,RIGHT, else all layers are of one kind")
        return LayerSelection(text, None)
    numbers = numbers_listed(text)
    if numbers is None:
        raise WallfacerError(f"{FLAG} {text}: must be {', '.join(KINDS)}, or layers like 1,3-8")
    layers = getattr(args, "num_layers", None)
    outside = sorted(number for number in numbers if number < 1 or (layers is not None and number > layers))
    if outside:
        raise WallfacerError(f"{FLAG} {text}: must be layers from 1 to {layers}, not {outside[0]}")
    return LayerSelection(text, numbers)


def mark_as_megatrons(layer: nn.Module) -> nn.Module:
    """Mark an attention module that ``--wallfacer-layers`` leaves to Megatron, and return the module.

    After the model is built, an error is raised if it contains Megatron's attention without this mark.
    """
    layer.wallfacer_keeps_megatrons = True
    return layer


def is_megatrons(layer: nn.Module) -> bool:
    """Return whether :func:`mark_as_megatrons` marked a module."""
    return getattr(layer, "wallfacer_keeps_megatrons", False)
