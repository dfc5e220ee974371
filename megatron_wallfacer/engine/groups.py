"""Process groups of a grid.

Each axis of size > 1 has two groups, so that results do not wait for inputs. Messages along no axis use a single group
``cp`` with all context-parallel ranks. If an axis has all these ranks, its inputs use ``cp`` too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from socket import gethostname
from typing import Any

import torch
import torch.distributed as dist

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import AXES, Grid

Channel = tuple[str, str]
Member = tuple[tuple[int, ...], Grid, str, bool]
KINDS = ("inputs", "results")
CPU = torch.device("cpu")
#: Channel of a new group of all context-parallel ranks, which replaces the caller's group.
_WHOLE = ("cp", "inputs")
_numbers = count(1)


@dataclass(frozen=True)
class AxisGroups:
    """The process groups of one rank.

    Attributes:
        rank: index of this rank in the context-parallel group.
        global_ranks: global ranks of the context-parallel group.
        hosts: name of the node of each rank of the context-parallel group.
        groups: process group by channel (axis, ``inputs`` or ``results``), in the order of creation, which is equal on
            all ranks. ``cp`` is the whole context-parallel group. An axis of size 1 has no group.
        given: context-parallel group of the caller, which the engine never destroys or closes.
        number: serial number of this set of groups, equal on all ranks of the job.
        backend: backend of the messages, ``nccl`` or ``gloo``; None for one process without torch.distributed.
        seconds: time in seconds to create and warm up the groups on this rank.
        device_bytes: GPU memory in bytes that all processes allocated while the groups were created; 0 on a CPU.
    """

    grid: Grid
    rank: int
    global_ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    groups: dict[Channel, dist.ProcessGroup]
    backend: str | None = None
    seconds: float = 0.0
    device_bytes: int = 0
    given: dist.ProcessGroup | None = None
    number: int = 0

    @property
    def made(self) -> tuple[dist.ProcessGroup, ...]:
        """Return the distinct groups that were created for the grid, in the order of creation."""
        return tuple(group for group in dict.fromkeys(self.groups.values()) if group is not self.given)

    def close(self) -> None:
        """Destroy the groups that were created for the grid and still exist.

        Every member of a group must call this method, because NCCL's teardown of a communicator waits for all ranks.
        All ranks destroy groups in the order of creation. Otherwise ranks could wait for each other in a circle.
        """
        for group in filter(is_alive, self.made):
            dist.destroy_process_group(group)


def backend_of(group: dist.ProcessGroup | None, device: torch.device) -> str | None:
    """Return the backend of a group for tensors on a device; None if the group has no backend for the device.

    ``torch.distributed.get_backend`` returns the backend with which a group was created. This is ``undefined`` after a
    plain ``init_process_group()``, and ``cpu:gloo,cuda:nccl`` for a group of two backends. ``group`` is None for the
    world.
    """
    pairs = (pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return {name: backend for name, backend in pairs}.get(device.type)


def is_alive(group: dist.ProcessGroup | None) -> bool:
    """Return whether a process group still exists. None stands for a single process without torch.distributed."""
    if group is None:
        return not dist.is_initialized()
    try:
        dist.get_rank(group)
    except ValueError:
        return False
    return True


def check_alive(group: dist.ProcessGroup | None) -> None:
    """Check that a process group still exists; see :func:`is_alive`.

    Raises:
        OptionError: torch.distributed has destroyed the group.
    """
    if not is_alive(group):
        raise OptionError("group", "a destroyed one", "a process group that torch.distributed still has")


def connect(
    group: dist.ProcessGroup | None,
    grid: Grid,
    *,
    device: torch.device = CPU,
    timeout: timedelta | None = None,
    options: Callable[[], Any] | None = None,
) -> AxisGroups:
    """Create the process groups of a grid inside a context-parallel group.

    The call is collective over the *world*, like ``torch.distributed.new_group``: every rank of the job calls this
    function with its own context-parallel group and grid. ``new_group`` with ``use_local_synchronization`` requires
    that all members of a group have created the same number of groups before. Ranks of different pipeline stages may
    have created different numbers of groups.

    Args:
        group: context-parallel group; None for the world, or for one process without torch.distributed.
        grid: grid whose ``cp_size`` is the size of the group.
        device: device of the messages.
        timeout: timeout of the created groups; the default of torch.distributed unless given.
        options: function that returns the ``pg_options`` of one new group, for NCCL only.

    Raises:
        OptionError: The size of the grid differs from the size of the group.
    """
    global_ranks = tuple(dist.get_process_group_ranks(group)) if dist.is_initialized() else (0,)
    check_size(len(global_ranks), grid)
    if not dist.is_initialized():
        return AxisGroups(grid, 0, global_ranks, (gethostname(),), {})
    cp = dist.group.WORLD if group is None else group
    backend = backend_of(cp, device)
    # On gloo only closed connections release a waiting rank. The caller's group must keep its connections open.
    everyone = _everyone(global_ranks, grid, apart=backend == "gloo" and grid.cp_size > 1)
    free, start = _free_bytes(device), time.perf_counter()
    made: dict[Channel, dist.ProcessGroup] = {}
    for channel, ranks in _every_subgroup(everyone):
        group = dist.new_group(
            ranks,
            timeout=timeout,
            # The backend of the context-parallel group may differ from the backend of the world.
            backend=dist.get_backend(cp),
            pg_options=options() if options is not None and backend == "nccl" else None,
            group_desc="_".join(("WALLFACER", *channel)).upper(),
        )
        if dist.get_rank() in ranks:
            made[channel] = group
    groups = _channels(grid, made.pop(_WHOLE, cp), made)
    _warm_up(groups, device)
    seconds, used = time.perf_counter() - start, max(0, free - _free_bytes(device))
    hosts = tuple(everyone[rank][2] for rank in global_ranks)
    return AxisGroups(grid, dist.get_rank(cp), global_ranks, hosts, groups, backend, seconds, used, cp, next(_numbers))


def _channels(
    grid: Grid, whole: dist.ProcessGroup, made: dict[Channel, dist.ProcessGroup]
) -> dict[Channel, dist.ProcessGroup]:
    """Return the process group of each pair (axis, ``inputs`` or ``results``).

    If an axis has all ranks, inputs are sent in the group ``whole``.
    """
    groups = {("cp", kind): whole for kind in KINDS}
    groups |= {(axis, "inputs"): whole for axis in AXES if grid.size_of(axis) == grid.cp_size > 1}
    return groups | made


def check_size(ranks: int, grid: Grid) -> None:
    """Check that the size of a grid equals the size of the context-parallel group.

    Raises:
        OptionError: The sizes differ.
    """
    if grid.cp_size != ranks:
        raise OptionError("grid", grid, f"axes whose product is the group's size {ranks}")


def _warm_up(groups: dict[Channel, dist.ProcessGroup], device: torch.device) -> None:
    """Run one small all-reduce in each process group.

    NCCL creates the communicator of a group in the first operation of the group. All ranks of the group must take part
    in this first operation, but some transfers of the engine involve only two ranks. The warm-up also detects a broken
    network before the first training step.
    """
    for group in dict.fromkeys(groups.values()):
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU in bytes; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    torch.zeros(1, device=device)  # the CUDA context is not counted
    return torch.cuda.mem_get_info(device)[0]


def _everyone(global_ranks: tuple[int, ...], grid: Grid, *, apart: bool) -> list[Member]:
    """Return (context-parallel ranks, grid, node, whether the caller's group must be replaced) of every rank."""
    mine = (global_ranks, grid, gethostname(), apart)
    everyone: list[Member] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _every_subgroup(everyone: list[Member]) -> list[tuple[Channel, tuple[int, ...]]]:
    """Return ((axis, ``inputs`` or ``results``), global ranks) of each group to create. All ranks return one list."""
    found: list[tuple[Channel, tuple[int, ...]]] = []
    for ranks, grid, apart in dict.fromkeys((ranks, grid, apart) for ranks, grid, _, apart in everyone):
        found += [(_WHOLE, ranks)] if apart else []
        found += [
            ((axis, kind), tuple(ranks[member] for member in members))
            for axis in AXES
            for kind in KINDS
            # The inputs of an axis of all ranks use the group of all ranks.
            if grid.size_of(axis) > 1 and (kind == "results" or grid.size_of(axis) < grid.cp_size)
            for members in dict.fromkeys(grid.neighbours(rank, axis) for rank in range(grid.cp_size))
        ]
    return found
