"""Run the transfers of a program with ``torch.distributed`` process groups.

All tensors of a message are sent as one buffer of bytes. The call that starts a transfer does not block. The wait for a
transfer ends when all receives have arrived and all sends have left. On NCCL the current stream of the device waits,
not the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.engine.pass_cache import PassCache
from megatron_wallfacer.engine.waits.progress import PROGRESS, Label
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.schedule.program import AllToAll, MessageBuffer, PointToPoint

#: Function of the operands of a pass by number, and of the works in flight by number of the transfer.
Action = Callable[[Sequence[Tensor], list[Any]], None]


class BoundTransfer(NamedTuple):
    """The calls that start one transfer and wait for it.

    Attributes:
        post: call that posts the receives before the transfer starts; None if the backend cannot post receives early.
        start: call that starts the transfer without blocking.
        wait: function that waits for the end of the transfer. A pass must call this function exactly once.
    """

    post: Action | None
    start: Action
    wait: Action


class Transfers:
    """Binds transfers to the process groups of a grid.

    Attributes:
        received: bytes received so far, by (axis, name of the tensor).
        failure: text of the first error, which closed the groups; empty while the groups can be used.
        graphs: CUDA graphs of passes (:class:`megatron_wallfacer.engine.graphed.Graphs`); None without CUDA graphs.
    """

    def __init__(self, groups: AxisGroups) -> None:
        self.groups, self.passes = groups, PassCache()
        self.failure = ""
        self.graphs: Any = None
        self.received: Counter[tuple[str, str]] = Counter()

    @property
    def all_to_all(self) -> bool:
        """Return whether a head exchange is one collective. The receives of a collective cannot be posted early."""
        return self.groups.backend != "gloo"

    def bind(self, number: int, transfer: PointToPoint | AllToAll, device: torch.device) -> BoundTransfer:
        """Return the calls that post, start and wait for a transfer. ``number`` is the index of its ``Work`` list."""
        group = self.groups.groups[transfer.channel]
        if isinstance(transfer, AllToAll):
            ranks = [self._rank_in(group, rank) for rank in transfer.ranks]
            return _all_to_all(number, group, transfer, ranks, self._label(transfer, transfer.ranks))
        sends, receives = self._in_group(group, transfer.sends), self._in_group(group, transfer.receives)
        if self.groups.backend == "gloo":
            return _in_halves(number, group, sends, receives, self._labels(transfer))
        peers = [message.peer for message in (transfer.receives or transfer.sends)]
        label = self._label(transfer, peers, sends=not transfer.receives)
        return _at_once(number, group, sends, receives, device, label)

    def _labels(self, transfer: PointToPoint) -> tuple[Label, ...]:
        """Return a label for each receive of a transfer, then for each send."""
        receives = (self._label(transfer, [message.peer]) for message in transfer.receives)
        return *receives, *(self._label(transfer, [message.peer], sends=True) for message in transfer.sends)

    def _label(self, transfer: PointToPoint | AllToAll, peers: Sequence[int], *, sends: bool = False) -> Label:
        others = tuple(self.groups.global_ranks[peer] for peer in peers if peer != self.groups.rank)
        return Label.of(transfer.payload, others, transfer.channel[0], sends=sends)

    def _in_group(self, group: dist.ProcessGroup, messages: Sequence[MessageBuffer]) -> tuple[MessageBuffer, ...]:
        """Return the messages with each peer converted to its rank in the process group."""
        return tuple(message._replace(peer=self._rank_in(group, message.peer)) for message in messages)

    def _rank_in(self, group: dist.ProcessGroup, rank: int) -> int:
        return dist.get_group_rank(group, self.groups.global_ranks[rank])


def _in_halves(
    number: int,
    group: dist.ProcessGroup,
    sends: Sequence[MessageBuffer],
    receives: Sequence[MessageBuffer],
    labels: Sequence[Label],
) -> BoundTransfer:
    """Return a transfer over gloo whose receives can be posted early. Gloo delays messages until a receive is posted.

    If the peer has exited, gloo raises an error in a send, in a receive, or in the wait for the send or receive.
    """

    def post(operands: Sequence[Tensor], works: list[Any]) -> None:
        works[number] = posted = []
        try:
            for peer, operand, tag in receives:
                posted.append(group.recv([operands[operand]], peer, tag))
        except RuntimeError:
            PROGRESS.broken = labels[len(posted)]
            raise

    def start(operands: Sequence[Tensor], works: list[Any]) -> None:
        if works[number] is None:
            post(operands, works)
        posted = works[number]
        try:
            for peer, operand, tag in sends:
                posted.append(group.send([operands[operand]], peer, tag))
        except RuntimeError:
            PROGRESS.broken = labels[len(posted)]
            raise

    return BoundTransfer(post, start, wait_for_all(number, labels))


def _at_once(
    number: int,
    group: dist.ProcessGroup,
    sends: Sequence[MessageBuffer],
    receives: Sequence[MessageBuffer],
    device: torch.device,
    label: Label,
) -> BoundTransfer:
    """Return a transfer as one group operation, like ``torch.distributed.batch_isend_irecv`` without its checks.

    NCCL runs the operations of a communicator in order, so an earlier receive would delay a send.
    """
    captures = torch.cuda.is_current_stream_capturing if device.type == "cuda" else bool

    def start(operands: Sequence[Tensor], works: list[Any]) -> None:
        group._start_coalescing(device)
        for peer, operand, tag in receives:
            group.recv([operands[operand]], peer, tag)
        for peer, operand, tag in sends:
            group.send([operands[operand]], peer, tag)
        work = group._end_coalescing(device)
        works[number] = (work,)
        if not captures():
            # A work has no tensors after its wait, so it may outlive the pass.
            PROGRESS.posted = label, work

    return BoundTransfer(None, start, wait_for_all(number, (label,)))


def _all_to_all(
    number: int, group: dist.ProcessGroup, exchange: AllToAll, ranks: Sequence[int], label: Label
) -> BoundTransfer:
    """Return a head exchange as a single all-to-all. ``ranks`` must be all ranks of the group in order."""
    if list(ranks) != list(range(group.size())):
        raise WallfacerError(f"ranks={ranks}: must be all {group.size()} ranks of the head axis in order")
    send, receive, options = exchange.send, exchange.receive, dist.AllToAllOptions()
    # Without asyncOp the collective would run on the stream of the attention kernels.
    options.asyncOp = True

    def start(operands: Sequence[Tensor], works: list[Any]) -> None:
        works[number] = (group.alltoall_base(operands[receive], operands[send], [], [], options),)

    return BoundTransfer(None, start, wait_for_all(number, (label,)))


def wait_for_all(number: int, labels: Sequence[Label]) -> Action:
    """Return a function that waits for all works of a transfer. The watchdog prints the labels if a wait is long."""

    def wait(operands: Sequence[Tensor], works: list[Any]) -> None:
        try:
            for PROGRESS.label, work in zip(labels, works[number], strict=True):
                work.wait()
        except BaseException:
            PROGRESS.broken = PROGRESS.label
            raise
        finally:
            PROGRESS.label = None
            PROGRESS.waits += 1
        works[number] = None

    return wait
