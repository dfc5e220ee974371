"""The progress of this process in attention. Attention writes :class:`Progress`, and the watchdog thread reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

_NAMES = {"dout": "dO", "out": "O", "lse": "lse", "delta": "delta"}


class Label(NamedTuple):
    """The messages that a rank waits for.

    Attributes:
        tensors: names of the tensors, as shown to users.
        peers: global ranks that send or receive the messages.
        axis: grid axis of the messages.
        sends: whether the rank waits until its own message has left, instead of until a message arrives.
    """

    tensors: tuple[str, ...]
    peers: tuple[int, ...]
    axis: str
    sends: bool = False

    @classmethod
    def of(cls, tensors: tuple[str, ...], peers: tuple[int, ...], axis: str, *, sends: bool = False) -> Label:
        """Return a label, given the schedule's names of the tensors. The label shows ``dk`` as ``dK``."""
        return cls(tuple(map(_shown, tensors)), tuple(dict.fromkeys(peers)), axis, sends)


class Progress:
    """What this process computes or waits for at the moment.

    Attributes:
        label: label of the wait that blocks the host; None without a wait.
        passes: number of passes that have begun.
        layer: number or name of the layer of the last pass; None outside a model.
        broken: messages whose wait raised an error; None after the error has been reported.
        in_flight: works of each transfer of the current pass; None in place of the works before the transfer starts
            and after its wait. Works of a failed pass are removed, because they keep its tensors alive.
        posted: label and ``Work`` of the last transfer started on NCCL, where waits do not block the host.
    """

    __slots__ = ("backward", "broken", "in_flight", "label", "layer", "passes", "posted", "waits")

    def __init__(self) -> None:
        self.label: Label | None = None
        self.broken: Label | None = None
        self.in_flight: Sequence[Any] = ()
        self.waits = self.passes = 0
        self.layer: int | str | None = None
        self.backward = False
        self.posted: tuple[Label, Any] | None = None


#: Progress of this process. As in torch.distributed, passes in several threads at once are not supported.
PROGRESS = Progress()


def _shown(tensor: str) -> str:
    if tensor in _NAMES:
        return _NAMES[tensor]
    return f"d{tensor[1:].upper()}" if tensor.startswith("d") else tensor.upper()


def layer_text(layer: int | str) -> str:
    """Return ``layer 7`` for the layer number 7. Names of layers, such as ``MTP depth 1``, are returned unchanged."""
    return f"layer {layer}" if isinstance(layer, int) else layer
