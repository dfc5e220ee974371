"""Transfers through host memory: several ranks on one GPU, for a developer's machine or a card of CI.

NCCL before 2.30 needs a GPU for each rank, and gloo sends nothing from a GPU. So every message is copied to the host,
sent by gloo, and copied back. The host waits for each copy: this shows that something works, and is never fast. It has
to be requested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.engine.transfers import BoundTransfer, Transfers
from megatron_wallfacer.engine.waits.progress import PROGRESS
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.program import PointToPoint

#: ``direct``: from and to the tensors' own device, by the group's backend. ``staged``: through host memory, by gloo.
TRANSFERS = ("direct", "staged")


class StagedTransfers(Transfers):
    """Transfers through host memory; the groups' backend is gloo."""

    def bind(self, number: int, transfer: PointToPoint, device: torch.device) -> BoundTransfer:
        group = self.groups.groups[transfer.channel]
        sends, receives = self._in_group(group, transfer.sends), self._in_group(group, transfer.receives)
        labels = self._labels(transfer)

        def post(operands: Sequence[Tensor], works: list[Any]) -> None:
            landings = [self._landing(operands[message.operand]) for message in receives]
            works[number] = (
                [group.recv([x], message.peer, message.tag) for x, message in zip(landings, receives, strict=True)],
                landings,
                [],
            )

        def start(operands: Sequence[Tensor], works: list[Any]) -> None:
            if works[number] is None:
                post(operands, works)
            posted, _, sent = works[number]
            for peer, operand, tag in sends:
                # The copy has to live until it has left.
                sent.append(self._departing(operands[operand]))
                posted.append(group.send([sent[-1]], peer, tag))

        def wait(operands: Sequence[Tensor], works: list[Any]) -> None:
            posted, landings, _ = works[number]
            try:
                for PROGRESS.label, work in zip(labels, posted, strict=True):
                    work.wait()
            except BaseException:
                PROGRESS.broken = PROGRESS.label
                raise
            finally:
                PROGRESS.label = None
                PROGRESS.waits += 1
            for landing, message in zip(landings, receives, strict=True):
                operands[message.operand].copy_(landing)
            works[number] = None

        return BoundTransfer(post, start, wait)

    def _landing(self, message: Tensor) -> Tensor:
        """Where the bytes of a message are received."""
        return torch.empty_like(message, device="cpu")

    def _departing(self, message: Tensor) -> Tensor:
        """The bytes of a message as they are sent."""
        return message.to("cpu", copy=True)


def message_device(kind: str, device: torch.device) -> torch.device:
    """Return the device on which torch.distributed finds the messages of tensors on ``device``."""
    return torch.device("cpu") if kind == "staged" else device


def check_transfers(kind: str, device: torch.device, backend: str | None) -> None:
    """Whether tensors on such a device can be moved so, before any group is made.

    Args:
        kind: one of :data:`TRANSFERS`.
        device: of the tensors.
        backend: of the groups, for the device of the messages; None where there is one process only, and the group's
            whole configuration (``cuda:nccl``) where it has none for that device.

    Raises:
        OptionError: they cannot.
    """
    if kind not in TRANSFERS:
        raise OptionError("transfers", kind, f"one of {', '.join(TRANSFERS)}")
    if kind == "staged" and backend not in (None, "gloo"):
        raise OptionError("transfers", kind, f"direct where the backend is {backend}: staged is for gloo")
    if kind == "direct" and ":" in (backend or ""):
        raise OptionError("transfers", kind, f"of tensors on another device than {device.type} over {backend}")
    if kind == "direct" and device.type == "cuda" and backend == "gloo":
        raise OptionError(
            "transfers", kind, "staged where the backend is gloo and tensors lie on a GPU; NCCL moves them direct"
        )


def make_transfers(kind: str, groups: AxisGroups) -> Transfers:
    """Transfers of a kind that :func:`check_transfers` has let pass."""
    return StagedTransfers(groups) if kind == "staged" else Transfers(groups)
