"""Names of layers in messages."""

from __future__ import annotations


def layer_text(layer: int | str) -> str:
    """Return a layer as messages name it: ``layer 7`` for a number, a name such as ``MTP depth 1`` as it is.

    Args:
        layer: number of the layer in the whole model from 1, or the name of one that the decoder does not count.
    """
    return f"layer {layer}" if isinstance(layer, int) else layer
