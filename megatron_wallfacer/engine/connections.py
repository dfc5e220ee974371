"""The process's only cache of axis groups: one :class:`Transfers` for each context-parallel group, grid and kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_wallfacer.engine.backends import backend_of, check_alive, is_alive
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.interrupts import deferred_interrupts
from megatron_wallfacer.engine.leaving import at_exit
from megatron_wallfacer.engine.merge import check_rows
from megatron_wallfacer.engine.staged import check_transfers, make_transfers, message_device
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.engine.waits.watch import start_watch
from megatron_wallfacer.schedule.grid import Grid

# The key holds the group itself and not its ranks: two groups of the same ranks die at different times. As long as an
# entry holds a group, no new one can have its identity.
_Key = tuple[dist.ProcessGroup | None, Grid, str, str]
_made: dict[_Key, Transfers] = {}


def find(group: dist.ProcessGroup | None, grid: Grid, kind: str, device: torch.device) -> Transfers | None:
    """Return the transfers that :func:`connected` made for these arguments, or None."""
    return _made.get((_named(group), grid, kind, device.type))


def connected(
    group: dist.ProcessGroup | None,
    grid: Grid,
    kind: str,
    device: torch.device,
    *,
    timeout: timedelta | None = None,
    options: Callable[[], Any] | None = None,
) -> Transfers:
    """Return the transfers of a context-parallel group along the axes of a grid.

    Making groups is collective and slow, so it is done in the first call only; that call is collective over the world,
    as :func:`megatron_wallfacer.engine.groups.connect` is. It also destroys what belongs to groups that are gone.
    Ctrl-C takes effect after the groups are made.

    Args:
        group: the context-parallel group; None for the world, or for one process without torch.distributed.
        grid: its ``cp_size`` must be the group's size.
        kind: one of :data:`megatron_wallfacer.engine.staged.TRANSFERS`.
        device: device of the tensors that are moved.
        timeout: of the groups that are made; torch.distributed's default unless given.
        options: makes the ``pg_options`` of one group; for NCCL only.

    Raises:
        OptionError: the group is destroyed or of another size, or its backend cannot move tensors of the device.
    """
    group = _named(group)
    check_alive(group)
    found = find(group, grid, kind, device)
    if found is not None:
        return found
    check_rows(device)
    message = message_device(kind, device)
    backend = None if group is None else backend_of(group, message) or dist.get_backend_config(group)
    check_transfers(kind, device, backend)
    _close(lambda cp: not is_alive(cp))
    with deferred_interrupts():
        axis_groups = connect(group, grid, device=message, timeout=timeout, options=options)
        made = _made[group, grid, kind, device.type] = make_transfers(kind, axis_groups)
    if dist.is_initialized():
        at_exit(close_groups)
        start_watch()
    return made


def connections_of(global_ranks: Sequence[int]) -> list[Transfers]:
    """Return the transfers of every grid of the context-parallel groups that have these ranks."""
    return [made for made in _made.values() if made.groups.global_ranks == tuple(global_ranks)]


def close_groups() -> None:
    """Destroy the process groups of every entry, in the order in which they were made. Collective on NCCL."""
    _close(lambda cp: True)


def _close(chosen: Callable[[dist.ProcessGroup | None], bool]) -> None:
    """Destroy and forget the entries of the chosen context-parallel groups."""
    for key in [key for key in _made if chosen(key[0])]:
        transfers = _made.pop(key)
        # Graphs hold operations of the groups' communicators, which then cannot be destroyed.
        if transfers.graphs is not None:
            transfers.graphs.drop()
        # Compiled passes hold their groups.
        transfers.passes.clear()
        transfers.groups.close()


def _named(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the group itself where None stands for the world."""
    return dist.group.WORLD if group is None and dist.is_initialized() else group
