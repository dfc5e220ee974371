"""Transfers through host memory, so that several ranks can share one GPU in development and CI.

NCCL before 2.30 needs one GPU per rank, and gloo cannot send from a GPU. A staged transfer copies each message to the
host, sends it by gloo, and copies it back. The host waits for each copy, so staged transfers only serve functional
tests. They are off by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine.transfers import BoundTransfer, Transfers, wait_for_all
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.program import PointToPoint


class StagedTransfers(Transfers):
    """Transfers through host memory over gloo groups."""

    def bind(self, number: int, transfer: PointToPoint, device: torch.device) -> BoundTransfer:
        """See :meth:`Transfers.bind`."""
        group = self.groups.groups[transfer.channel]
        sends, receives = self._in_group(group, transfer.sends), self._in_group(group, transfer.receives)
        wait_for_works = wait_for_all(number, self._labels(transfer))
        # Copies in host memory, which must exist until the wait for the transfer has ended.
        received: list[Tensor] = []
        sent: list[Tensor] = []

        def post(operands: Sequence[Tensor], works: list[Any]) -> None:
            received[:] = [self._landing(operands[message.operand]) for message in receives]
            works[number] = [
                group.recv([x], message.peer, message.tag) for x, message in zip(received, receives, strict=True)
            ]

        def start(operands: Sequence[Tensor], works: list[Any]) -> None:
            if works[number] is None:
                post(operands, works)
            for peer, operand, tag in sends:
                sent.append(self._departing(operands[operand]))
                works[number].append(group.send([sent[-1]], peer, tag))

        def wait(operands: Sequence[Tensor], works: list[Any]) -> None:
            wait_for_works(operands, works)
            for x, message in zip(received, receives, strict=True):
                operands[message.operand].copy_(x)
            received.clear()
            sent.clear()

        return BoundTransfer(post, start, wait)

    def _landing(self, message: Tensor) -> Tensor:
        return torch.empty_like(message, device="cpu")

    def _departing(self, message: Tensor) -> Tensor:
        return message.to("cpu", copy=True)


#: ``direct`` sends between devices by the group's backend. ``staged`` sends through host memory by gloo.
TRANSFERS: dict[str, type[Transfers]] = {"direct": Transfers, "staged": StagedTransfers}


def check_transfers(kind: str, device: torch.device, backend: str | None) -> None:
    """Check ``transfers=kind`` against the device and the backend, before process groups are created.

    ``backend`` is the group's backend for messages on this device or, when staged, on the CPU; None for a single
    process. If the group has no such backend, ``backend`` is the configuration of the group, such as ``cuda:nccl``.

    Raises:
        OptionError: The transfers cannot send the tensors.
    """
    if kind not in TRANSFERS:
        raise OptionError("transfers", kind, f"one of {', '.join(TRANSFERS)}")
    if kind == "staged" and backend not in (None, "gloo"):
        raise OptionError("transfers", kind, f"direct where the backend is {backend}: staged is for gloo")
    if kind == "direct" and ":" in (backend or ""):
        raise OptionError("transfers", kind, f"used with a backend for {device.type} tensors: {backend} has none")
    if kind == "direct" and device.type == "cuda" and backend == "gloo":
        raise OptionError(
            "transfers", kind, "staged where the backend is gloo and tensors lie on a GPU; NCCL moves them direct"
        )
