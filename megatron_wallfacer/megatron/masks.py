"""Convert Megatron's configuration of a layer to a mask."""

from __future__ import annotations

from typing import Any

from megatron_wallfacer.schedule.mask import Mask, window_mask


def layer_mask(config: Any, layer_number: int, causal: bool) -> Mask:
    """Return the mask of a layer for sequences that are not packed.

    Query i sees the keys from i - left to i + right inclusive, as in Megatron and TransformerEngine. The limit
    ``right`` is 0 in a causal layer, as in TransformerEngine. Megatron's local attention uses the window's ``right``
    even in a causal layer.
    """
    if not is_window_layer(config, layer_number):
        return Mask(right=0 if causal else None)
    return window_mask(config.window_size, causal)


def is_window_layer(config: Any, layer_number: int) -> bool:
    """Return whether a layer has a sliding window. Without ``window_attn_skip_freq`` a window applies to all layers."""
    if not getattr(config, "window_size", None):
        return False
    if getattr(config, "window_attn_skip_freq", None) is None:
        return True
    # Only Megatron releases with the setting have this function.
    from megatron.core.transformer.utils import is_layer_window_attention

    return is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
