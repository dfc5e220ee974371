"""The cache of process groups, with one :class:`Transfers` per context-parallel group, grid and kind of transfers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_wallfacer.engine.groups import CPU, backend_of, check_alive, connect, is_alive
from megatron_wallfacer.engine.leaving import at_exit
from megatron_wallfacer.engine.merge import check_rows
from megatron_wallfacer.engine.staged import TRANSFERS, check_transfers
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.engine.waits.watch import start_watch
from megatron_wallfacer.schedule.grid import Grid

# The key has the group instead of its ranks, because two groups of the same ranks are destroyed at different times.
# While an entry references a group, no new group can have the same identity.
_Key = tuple[dist.ProcessGroup | None, Grid, str, str]
_made: dict[_Key, Transfers] = {}


def find(group: dist.ProcessGroup | None, grid: Grid, kind: str, device: torch.device) -> Transfers | None:
    """Return the transfers that :func:`connected` has created for the same arguments; None if there are none."""
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

    The first call creates process groups (:func:`megatron_wallfacer.engine.groups.connect`), which is slow and
    collective over the world. The first call also drops entries of groups that were destroyed. Ctrl-C takes effect
    after the groups are created. ``kind`` is one of :data:`megatron_wallfacer.engine.staged.TRANSFERS`, and the other
    arguments are those of ``connect``.

    Raises:
        OptionError: The group is destroyed, its size is not ``cp_size``, or its backend cannot send the tensors.
    """
    group = _named(group)
    check_alive(group)
    found = find(group, grid, kind, device)
    if found is not None:
        return found
    check_rows(device)
    message = CPU if kind == "staged" else device
    backend = None if group is None else backend_of(group, message) or dist.get_backend_config(group)
    check_transfers(kind, device, backend)
    _close(lambda cp: not is_alive(cp))
    with deferred_interrupts():
        axis_groups = connect(group, grid, device=message, timeout=timeout, options=options)
        made = _made[group, grid, kind, device.type] = TRANSFERS[kind](axis_groups)
    if dist.is_initialized():
        at_exit(close_groups)
        start_watch()
    return made


def connections_of(global_ranks: Sequence[int]) -> list[Transfers]:
    """Return the cached :class:`Transfers` of all grids of the context-parallel group with the given global ranks."""
    return [made for made in _made.values() if made.groups.global_ranks == tuple(global_ranks)]


def close_groups() -> None:
    """Destroy all cached process groups in the order of their creation. Collective on NCCL."""
    _close(lambda cp: True)


def _close(chosen: Callable[[dist.ProcessGroup | None], bool]) -> None:
    """Destroy the process groups of the chosen context-parallel groups, and drop the cache entries of these groups."""
    for key in [key for key in _made if chosen(key[0])]:
        transfers = _made.pop(key)
        # Graphs contain operations of the communicators, so they must be freed before the communicators.
        if transfers.graphs is not None:
            transfers.graphs.drop()
        # Compiled passes reference their groups.
        transfers.passes.clear()
        transfers.groups.close()


def _named(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return dist.group.WORLD if group is None and dist.is_initialized() else group


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Delay SIGINT until the end of the ``with`` block.

    If the process of one rank ended between the creation of two groups, all other ranks would wait for that rank until
    the timeout of process groups.

    The context has no effect outside the main thread, and no effect if SIGINT has no Python handler.

    Raises:
        KeyboardInterrupt: SIGINT arrived inside the ``with`` block.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if arrived:
        handler(*arrived[0])
