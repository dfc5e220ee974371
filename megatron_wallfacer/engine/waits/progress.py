"""The progress of this process in attention: plain attributes, which passes write and a thread reads.

A pass only writes attributes, which costs almost no time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_NAMES = {"dout": "dO", "out": "O", "lse": "lse", "delta": "delta"}


class Label(NamedTuple):
    """The messages that a rank waits for.

    Attributes:
        tensors: names of the tensors, as shown to users.
        peers: global ranks of the other ends.
        axis: grid axis of the messages.
        sends: whether the rank waits until its own message has left, instead of until a message arrives.
    """

    tensors: tuple[str, ...]
    peers: tuple[int, ...]
    axis: str
    sends: bool = False

    @classmethod
    def of(cls, tensors: tuple[str, ...], peers: tuple[int, ...], axis: str, *, sends: bool = False) -> Label:
        """Return a label, given names of tensors as in schedules: ``dk`` is shown as ``dK``."""
        return cls(tuple(map(_shown, tensors)), tuple(dict.fromkeys(peers)), axis, sends)


class Progress:
    """The current pass and wait of this process.

    Attributes:
        label: label of the wait that blocks the host; None without a wait.
        waits: number of waits that have ended.
        passes: number of passes that have begun.
        layer: number or name of the layer of the last pass; None outside a model.
        backward: whether the last pass is a backward pass.
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


#: Progress of this process. Passes of several threads are not supported, as in torch.distributed.
PROGRESS = Progress()


def _shown(tensor: str) -> str:
    if tensor in _NAMES:
        return _NAMES[tensor]
    return f"d{tensor[1:].upper()}" if tensor.startswith("d") else tensor.upper()


def layer_text(layer: int | str) -> str:
    """Return the name of a layer for messages: ``layer 7`` for a number, ``MTP depth 1`` for that name.

    Args:
        layer: number of the layer in the whole model from 1, or name of a layer outside the decoder.
    """
    return f"layer {layer}" if isinstance(layer, int) else layer
