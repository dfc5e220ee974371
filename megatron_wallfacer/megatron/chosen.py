"""Which layers are the plugin's: ``--wallfacer-layers``. Others keep Megatron's attention and its ``--cp-comm-type``.

Megatron's own attention splits a sequence only with TransformerEngine, in the same zig-zag layout, so both kinds can
stand in one model there, and nowhere else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.lists import numbers_listed
from megatron_wallfacer.megatron.masks import is_window_layer

FLAG = "--wallfacer-layers"
#: What a layer is by its window, where ``--window-attn-skip-freq`` gives it to some.
KINDS = ("full", "window")


@dataclass(frozen=True)
class Chosen:
    """The layers that are the plugin's.

    Attributes:
        text: as it was typed.
        numbers: 1-based, over all pipeline stages; None where a kind is asked for.
    """

    text: str
    numbers: frozenset[int] | None

    def has(self, config: Any, layer_number: int) -> bool:
        """Whether this layer is among them."""
        if self.numbers is not None:
            return layer_number in self.numbers
        return is_window_layer(config, layer_number) == (self.text == "window")


def chosen_layers(args: argparse.Namespace) -> Chosen | None:
    """What the flag says; None where all layers are the plugin's.

    Raises:
        WallfacerError: it is neither a kind of layer nor a list of layers of the model.
    """
    text = args.wallfacer_layers
    if text is None:
        return None
    if text in KINDS:
        if getattr(args, "window_size", None) is None:
            raise WallfacerError(f"{FLAG} {text}: needs --window-size LEFT,RIGHT beside it, else all layers are alike")
        return Chosen(text, None)
    numbers = numbers_listed(text)
    if numbers is None:
        raise WallfacerError(f"{FLAG} {text}: must be {', '.join(KINDS)}, or layers like 1,3-8")
    layers = getattr(args, "num_layers", None)
    beyond = sorted(number for number in numbers if number < 1 or (layers is not None and number > layers))
    if beyond:
        raise WallfacerError(f"{FLAG} {text}: must be layers from 1 to {layers}, not {beyond[0]}")
    return Chosen(text, numbers)


def refuse_left_layers(args: argparse.Namespace, argv: Sequence[str]) -> str | None:
    """A rule of :mod:`megatron_wallfacer.megatron.refusals`: who would attend in the layers that are left."""
    text, implementation = getattr(args, "wallfacer_layers", None), getattr(args, "transformer_impl", None)
    if text is None or implementation == "transformer_engine" or args.wallfacer_cp_size == 1:
        return None
    return (
        f"{FLAG} {text}: must be left out with --transformer-impl {implementation}, the attention of the other layers "
        "splits sequences only with transformer_engine"
    )


def left_to_megatron(layer: nn.Module) -> nn.Module:
    """Mark an attention that is not the plugin's on purpose, for the count of layers."""
    layer.wallfacer_left = True
    return layer


def is_left(layer: nn.Module) -> bool:
    """Whether :func:`left_to_megatron` marked it."""
    return getattr(layer, "wallfacer_left", False)
