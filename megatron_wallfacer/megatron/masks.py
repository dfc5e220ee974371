"""Which keys a layer's queries see: Megatron's configuration of a layer turned into a mask."""

from __future__ import annotations

from typing import Any

from megatron_wallfacer.schedule.mask import Mask, window_mask


def layer_mask(config: Any, layer_number: int, causal: bool) -> Mask:
    """The mask of a layer, packed sequences aside.

    Query i sees keys i - left to i + right, both included, as in Megatron and TransformerEngine. In a causal layer
    right is 0 whatever the window says, as in TransformerEngine; Megatron's local attention would let it see ahead.

    Args:
        config: Megatron's TransformerConfig.
        layer_number: 1-based, over all pipeline stages.
        causal: whether the layer is.
    """
    if not is_window_layer(config, layer_number):
        return Mask(right=0 if causal else None)
    return window_mask(config.window_size, causal)


def is_window_layer(config: Any, layer_number: int) -> bool:
    """Whether Megatron gives this layer the window. Without ``window_attn_skip_freq`` every layer has it."""
    if not getattr(config, "window_size", None):
        return False
    if getattr(config, "window_attn_skip_freq", None) is None:
        return True
    # Only Megatrons that have the setting have the function, which alone decides what the setting means.
    from megatron.core.transformer.utils import is_layer_window_attention

    return is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
