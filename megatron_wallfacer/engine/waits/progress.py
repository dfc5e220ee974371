"""Where this process is in attention: plain attributes, written by the passes and read by a thread.

Writing an attribute is all that a pass does for it, so that a wait costs no more than before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_NAMES = {"dout": "dO", "out": "O", "lse": "lse", "delta": "delta"}


class Label(NamedTuple):
    """What a wait is for.

    Attributes:
        tensors: names of the tensors in the message, as messages show them.
        peers: the ranks at the other ends, as torch.distributed numbers them.
        axis: along which the message goes.
        sends: the rank waits until its own message has left; else until one has arrived.
    """

    tensors: tuple[str, ...]
    peers: tuple[int, ...]
    axis: str
    sends: bool = False

    @classmethod
    def of(cls, tensors: tuple[str, ...], peers: tuple[int, ...], axis: str, *, sends: bool = False) -> Label:
        """Return the label of tensors named as schedules name them: ``dk`` is shown as ``dK``."""
        return cls(tuple(map(_shown, tensors)), tuple(dict.fromkeys(peers)), axis, sends)


class Progress:
    """What this process does at present.

    Attributes:
        label: of the wait that blocks the host; None for none.
        waits: waits that have ended.
        passes: passes that have begun.
        layer: number or name of the layer of the last pass; None outside a model.
        backward: the last pass is a backward pass.
        broken: label of a wait that ended in an error, until the error is reported.
        posted: label and work of the last messages that were started on NCCL, whose waits do not block the host.
    """

    __slots__ = ("backward", "broken", "label", "layer", "passes", "posted", "waits")

    def __init__(self) -> None:
        self.label: Label | None = None
        self.broken: Label | None = None
        self.waits = self.passes = 0
        self.layer: int | str | None = None
        self.backward = False
        self.posted: tuple[Label, Any] | None = None


#: Of this process. Passes of several threads would be mixed up; torch.distributed does not allow them either.
PROGRESS = Progress()


def _shown(tensor: str) -> str:
    if tensor in _NAMES:
        return _NAMES[tensor]
    return f"d{tensor[1:].upper()}" if tensor.startswith("d") else tensor.upper()


def layer_text(layer: int | str) -> str:
    """Return a layer as messages name it: ``layer 7`` for a number, a name such as ``MTP depth 1`` as it is.

    Args:
        layer: number of the layer in the whole model from 1, or the name of one that the decoder does not count.
    """
    return f"layer {layer}" if isinstance(layer, int) else layer
