"""Process groups of a grid: two for each axis on which a rank has company, so that results wait for no inputs."""

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

from megatron_wallfacer.engine.backends import backend_of, is_alive
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import AXES, Grid

Channel = tuple[str, str]
Member = tuple[tuple[int, ...], Grid, str, bool]
KINDS = ("inputs", "results")
CPU = torch.device("cpu")
#: Channel under which the group of all context-parallel ranks is made, where it is not the caller's.
_WHOLE = ("cp", "inputs")
_numbers = count(1)


@dataclass(frozen=True)
class AxisGroups:
    """This rank's groups.

    Attributes:
        grid: the grid that they realise.
        rank: this rank's index in the context-parallel group.
        global_ranks: the context-parallel group's ranks, as torch.distributed numbers them.
        hosts: the machine of each of them.
        groups: process group by channel, (axis, ``inputs`` or ``results``); ``cp`` is the whole. An axis of one rank
            has none. In the order in which they were made, which is the same on every rank.
        given: the context-parallel group that the caller gave, which is never destroyed or closed here.
        number: of this set of groups, counted by every rank of the job alike.
        backend: backend of the messages, ``nccl`` or ``gloo``; None for one process without torch.distributed.
        seconds: time that making and warming up the groups took on this rank.
        device_bytes: GPU memory that became used meanwhile, by all processes of the GPU; 0 on a CPU.
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
        """The groups that were made for the grid, each once, in the order of creation."""
        return tuple(group for group in dict.fromkeys(self.groups.values()) if group is not self.given)

    def close(self) -> None:
        """Destroy the groups that were made for the grid; those that are destroyed already are skipped.

        Every member of a group has to call it: NCCL's teardown of a communicator waits for all of its ranks. A rank's
        axes overlap with other axes of its peers, so all ranks must follow one order. It is that of creation.
        """
        for group in filter(is_alive, self.made):
            dist.destroy_process_group(group)


def connect(
    group: dist.ProcessGroup | None,
    grid: Grid,
    *,
    device: torch.device = CPU,
    timeout: timedelta | None = None,
    options: Callable[[], Any] | None = None,
) -> AxisGroups:
    """Make the groups of a grid inside a context-parallel group.

    Collective over the *world*, like ``torch.distributed.new_group``: every rank of the job enters, each with
    its own context-parallel group and grid. (The local-synchronisation mode of ``new_group`` would spare the
    others, but it derives the name of a group from the number of groups that a rank has, so it hangs as
    soon as two members differ in that: with pipeline stages, for instance.)

    Args:
        group: the context-parallel group; None for the whole world, or for one process without
            torch.distributed.
        grid: its ``cp_size`` must be the group's size.
        device: device of the messages.
        timeout: of the groups that are made; torch.distributed's default unless given.
        options: makes the ``pg_options`` of one group, ``ProcessGroupNCCL.Options``; for NCCL only.

    Raises:
        OptionError: the grid does not fit the group.
    """
    global_ranks = tuple(dist.get_process_group_ranks(group)) if dist.is_initialized() else (0,)
    check_size(len(global_ranks), grid)
    if not dist.is_initialized():
        return AxisGroups(grid, 0, global_ranks, (gethostname(),), {})
    cp = dist.group.WORLD if group is None else group
    backend = backend_of(cp, device)
    # Gloo releases a rank that waits only by closing its connections. Those of the caller's group stay open.
    everyone = _everyone(global_ranks, grid, apart=backend == "gloo" and grid.cp_size > 1)
    free, start = _free_bytes(device), time.perf_counter()
    made: dict[Channel, dist.ProcessGroup] = {}
    for channel, ranks in _every_subgroup(everyone):
        group = dist.new_group(
            ranks,
            timeout=timeout,
            # That of the context-parallel group, which need not be the world's.
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
    """Every channel's group: those that were made, and the whole for itself and for the inputs of an axis of all."""
    groups = {("cp", kind): whole for kind in KINDS}
    groups |= {(axis, "inputs"): whole for axis in AXES if grid.size_of(axis) == grid.cp_size > 1}
    return groups | made


def check_size(ranks: int, grid: Grid) -> None:
    """Check that a context-parallel group of so many ranks can have a grid.

    Raises:
        OptionError: the grid is of another size.
    """
    if grid.cp_size != ranks:
        raise OptionError("grid", grid, f"axes whose product is the group's size {ranks}")


def _warm_up(groups: dict[Channel, dist.ProcessGroup], device: torch.device) -> None:
    """Sum one small tensor over each group, on the device of the messages.

    NCCL makes a communicator with a group's first operation, and then all members must take part. The published
    permutation leaves some ranks where they are, so that first operation must not be one of its hops. It also
    shows a broken network here and not in the middle of a step.
    """
    for group in dict.fromkeys(groups.values()):
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_bytes(device: torch.device) -> int:
    """Return a GPU's free memory; 0 for a CPU, whose groups hold no device memory."""
    if device.type != "cuda":
        return 0
    torch.zeros(1, device=device)  # CUDA's own context is not counted
    return torch.cuda.mem_get_info(device)[0]


def _everyone(global_ranks: tuple[int, ...], grid: Grid, *, apart: bool) -> list[Member]:
    """Of every rank of the job: its context-parallel group, its grid, its machine, whether the whole is a new group."""
    mine = (global_ranks, grid, gethostname(), apart)
    everyone: list[Member] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _every_subgroup(everyone: list[Member]) -> list[tuple[Channel, tuple[int, ...]]]:
    """(channel, global ranks) of each group that has to be made anywhere in the job, the same list on every rank."""
    found: list[tuple[Channel, tuple[int, ...]]] = []
    for ranks, grid, apart in dict.fromkeys((ranks, grid, apart) for ranks, grid, _, apart in everyone):
        found += [(_WHOLE, ranks)] if apart else []
        found += [
            ((axis, kind), tuple(ranks[member] for member in members))
            for axis in AXES
            for kind in KINDS
            # An axis of all ranks has the whole group for its inputs.
            if grid.size_of(axis) > 1 and (kind == "results" or grid.size_of(axis) < grid.cp_size)
            for members in dict.fromkeys(grid.neighbours(rank, axis) for rank in range(grid.cp_size))
        ]
    return found
