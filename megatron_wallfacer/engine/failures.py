"""After an exception in a pass a rank closes its groups. Waiting ranks then raise an error with the first cause.

After an exception, messages of the pass may still be in flight. A later pass could receive these messages. So all later
passes with these groups raise an error, until :func:`megatron_wallfacer.attention.forget_groups` has destroyed the
groups on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_wallfacer.engine.agreement.compare import ranks_text
from megatron_wallfacer.engine.connections import connections_of, deferred_interrupts
from megatron_wallfacer.engine.groups import AxisGroups, is_alive
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.engine.waits.progress import PROGRESS, Label, layer_text
from megatron_wallfacer.errors import WallfacerError

if TYPE_CHECKING:
    from megatron_wallfacer.engine.call import Call

_SHOWN = 300
#: Tag that no message of a schedule has.
_TAG = 2**30
_AT_ONCE = timedelta(milliseconds=1)
_IN_FLIGHT_S = 1.0


def closed_error(cause: str) -> WallfacerError:
    """Return the error to raise after process groups were closed. ``cause`` describes the failure that closed them."""
    return WallfacerError(
        f"{cause}; attention's groups are closed: start the job again, or call forget_groups() on every rank"
    )


def pass_name(phase: str, layer: int | str | None) -> str:
    """Return a pass as a phrase: ``forward pass of layer 3``, or ``forward pass`` outside a model."""
    return f"{phase} pass" if layer is None else f"{phase} pass of {layer_text(layer)}"


def fail(call: Call, phase: str, error: BaseException) -> None:
    """Close the process groups of an attention call after an exception in a pass.

    The first rank that fails publishes the cause in the job's store. It waits up to one second for messages in flight,
    then closes its connections. On gloo the waiting ranks then get an error, read the cause, and raise an error with
    the cause. A killed rank publishes nothing. The first rank that waits for a killed rank publishes that its
    connection to the killed rank is lost.

    gloo does not end the send of a message that has been received in part. If the receiver is killed, or if a message
    takes longer than the second, the sender waits until the timeout of the group.

    Raises:
        WallfacerError: A failure of another rank caused the exception. The message names the other rank.
    """
    transfers = call.runtime.transfers
    if transfers.groups.grid.cp_size == 1 or not dist.is_initialized():
        return
    broken, PROGRESS.broken = PROGRESS.broken if _follows(error) else None, None
    failure = "failed" if broken is None else f"lost its connection to {_peers(broken)}"
    own = f"rank {dist.get_rank()} {failure} in the {pass_name(phase, call.layer)}: {reason_of(error)}"
    # Peers may wait in a pass of another grid, so the groups of all grids are closed.
    _close([transfers, *connections_of(transfers.groups.global_ranks)], own)
    if _follows(error) and (transfers.failure != own or broken is not None):
        raise closed_error(transfers.failure) from error


def fail_outside(group: dist.ProcessGroup, error: BaseException) -> None:
    """Close the connections of this rank in a context-parallel group, because this rank failed before a pass."""
    own = f"rank {dist.get_rank()} failed before a pass: {reason_of(error)}"
    _close(connections_of(dist.get_process_group_ranks(group)), own)


def reason_of(error: BaseException) -> str:
    """Return the type of an exception and the first line of its message."""
    first_line = " ".join(str(error).partition("\n")[0].split())[:_SHOWN]
    return ": ".join(filter(None, (type(error).__name__, first_line)))


def _close(connections: Sequence[Transfers], own: str) -> None:
    """Publish the cause of a failure, then close the connections of all grids of a context-parallel group."""
    affected = {id(one): one for one in connections}.values()
    if not affected:
        return
    # All grids share one key. Otherwise each grid could keep another cause if ranks fail at the same time.
    cause = _first_cause(min((one.groups for one in affected), key=lambda groups: groups.number), own)
    for one in affected:
        one.failure = one.failure or cause
    # After a second interrupt some connections would stay open, and other ranks would wait for this rank.
    with deferred_interrupts():
        for one in affected:
            _close_connections(one.groups)
        PROGRESS.in_flight = ()


def _first_cause(groups: AxisGroups, own: str) -> str:
    """Publish the failure of this rank, unless another rank has published one before. Return the first failure."""
    key = f"wallfacer/failure/{groups.number}/{groups.global_ranks[0]}"
    try:
        return dist.distributed_c10d._get_default_store().compare_set(key, "", own).decode()
    except RuntimeError:
        return own  # the rank whose process had the store has ended


def _close_connections(groups: AxisGroups) -> None:
    """Close the connections of this rank in the groups that were created for the grid.

    On gloo a wait that times out closes both ends of a connection, and all posted messages raise an error. On NCCL
    this function does nothing, because NCCL's watchdog ends the process.
    """
    if groups.backend != "gloo":
        return
    _finish_messages()
    for group in filter(is_alive, groups.made):
        for peer in range(group.size()):
            if peer != group.rank():
                with suppress(RuntimeError):
                    group.recv([torch.empty(1)], peer, _TAG).wait(_AT_ONCE)


def _finish_messages() -> None:
    """Wait until the messages of the failed pass have arrived, for at most one second.

    gloo reports no error to a send whose message is on its way when the receiver closes the connection. The sender
    would wait until the timeout of the group.
    """
    end = time.monotonic() + _IN_FLIGHT_S
    for work in (work for works in PROGRESS.in_flight for work in works or ()):
        with suppress(RuntimeError):
            # A second wait for the same work would not end.
            if not work.is_completed():
                work.wait(max(_AT_ONCE, timedelta(seconds=end - time.monotonic())))


def _peers(label: Label) -> str:
    several = "one of " if len(label.peers) > 1 else ""
    return f"{several}{ranks_text(label.peers)} ({label.axis})"


def _follows(error: BaseException) -> bool:
    """Return whether a failed transfer may have raised this exception. Another rank may be the cause."""
    return type(error) is RuntimeError or isinstance(error, dist.DistError)
