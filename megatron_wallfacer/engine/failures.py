"""An exception in a pass: its groups close, so that ranks that wait raise, and all ranks name the first cause.

Messages are on their way then, and a later pass would take them for its own. So the groups of the context-parallel
group are not used again, until :func:`megatron_wallfacer.attention.forget_groups` has destroyed them on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_wallfacer.engine.agreement.compare import ranks_text
from megatron_wallfacer.engine.connections import connections_of
from megatron_wallfacer.engine.groups import AxisGroups, is_alive
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.engine.waits.progress import PROGRESS, Label, layer_text
from megatron_wallfacer.errors import WallfacerError

if TYPE_CHECKING:
    from megatron_wallfacer.engine.call import Call

_SHOWN = 300
#: No message of a schedule has this tag.
_TAG = 2**30
_AT_ONCE = timedelta(milliseconds=1)


def closed_error(cause: str) -> WallfacerError:
    """Return the error of a pass over groups that are closed.

    Args:
        cause: what failed first, and where.
    """
    return WallfacerError(
        f"{cause}; attention's groups are closed: start the job again, or call forget_groups() on every rank"
    )


def pass_name(phase: str, layer: int | str | None) -> str:
    """Return a pass in words.

    Args:
        phase: ``forward`` or ``backward``.
        layer: number or name of the layer in the model; None outside a model.
    """
    return f"{phase} pass" if layer is None else f"{phase} pass of {layer_text(layer)}"


def fail(call: Call, phase: str, error: BaseException) -> None:
    """Close the groups of a call after an exception in a pass.

    The first rank that fails publishes why in the store of the job, then closes its connections. Ranks that wait for it
    get an error of gloo at once; they come here too, find the cause, and raise it. A rank that is killed publishes
    nothing: the first that waits for it publishes that it is gone.

    Args:
        call: the call of attention.
        phase: ``forward`` or ``backward``.
        error: what was raised.

    Raises:
        WallfacerError: the error only follows from that of another rank, or from its end. That rank is named.
    """
    transfers = call.runtime.transfers
    if transfers.groups.grid.cp_size == 1 or not dist.is_initialized():
        return
    broken, PROGRESS.broken = PROGRESS.broken if _follows(error) else None, None
    did = "failed" if broken is None else f"lost its connection to {_peers(broken)}"
    own = f"rank {dist.get_rank()} {did} in the {pass_name(phase, call.layer)}: {reason_of(error)}"
    # A rank may wait in a pass of another grid.
    _close([transfers, *connections_of(transfers.groups.global_ranks)], own)
    if _follows(error) and (transfers.failure != own or broken is not None):
        raise closed_error(transfers.failure) from error


def fail_outside(group: dist.ProcessGroup, error: BaseException) -> None:
    """Close the groups of a context-parallel group after an exception outside of a pass that others may have begun.

    Args:
        group: the context-parallel group.
        error: what was raised.
    """
    own = f"rank {dist.get_rank()} failed before a pass: {reason_of(error)}"
    _close(connections_of(dist.get_process_group_ranks(group)), own)


def reason_of(error: BaseException) -> str:
    """Return the type of an error and the first line of its text."""
    first_line = " ".join(str(error).partition("\n")[0].split())[:_SHOWN]
    return ": ".join(filter(None, (type(error).__name__, first_line)))


def _close(connections: Sequence[Transfers], own: str) -> None:
    """Close the connections of all grids of a context-parallel group; why is known before the first is closed.

    Args:
        connections: of this rank, each once or more.
        own: why this rank failed.
    """
    affected = {id(one): one for one in connections}.values()
    for one in affected:
        one.failure = one.failure or _first_cause(one.groups, own)
    for one in affected:
        _close_connections(one.groups)


def _first_cause(groups: AxisGroups, own: str) -> str:
    """Publish why this rank failed, and return why the first one did."""
    key = f"wallfacer/failure/{groups.number}/{groups.global_ranks[0]}"
    try:
        return dist.distributed_c10d._get_default_store().compare_set(key, "", own).decode()
    except RuntimeError:
        return own  # the store went with the rank that held it


def _close_connections(groups: AxisGroups) -> None:
    """Close this rank's connections of groups that were made for the grid.

    Gloo closes a connection where a wait runs out of time, at both of its ends, and everything that is posted on it
    ends in an error. On NCCL nothing is done: its watchdog ends the process.
    """
    if groups.backend != "gloo":
        return
    for group in filter(is_alive, groups.made):
        for peer in range(group.size()):
            if peer != group.rank():
                with suppress(RuntimeError):
                    group.recv([torch.empty(1)], peer, _TAG).wait(_AT_ONCE)


def _peers(label: Label) -> str:
    """The ranks at the other ends of a wait in words, and the axis."""
    several = "one of " if len(label.peers) > 1 else ""
    return f"{several}{ranks_text(label.peers)} ({label.axis})"


def _follows(error: BaseException) -> bool:
    """Whether an error is of a transfer, and not a rank's own."""
    return type(error) is RuntimeError or isinstance(error, dist.DistError)
