"""Process groups of a grid: two for each axis on which a rank has company, so that results wait for no inputs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from socket import gethostname

import torch
import torch.distributed as dist

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import AXES, Grid

Channel = tuple[str, str]
Member = tuple[tuple[int, ...], Grid, str]
KINDS = ("inputs", "results")


@dataclass(frozen=True)
class AxisGroups:
    """This rank's groups.

    Attributes:
        grid: the grid that they realise.
        rank: this rank's index in the context-parallel group.
        global_ranks: the context-parallel group's ranks, as torch.distributed numbers them.
        hosts: the machine of each of them.
        groups: process group by channel, (axis, ``inputs`` or ``results``); ``cp`` is the whole. An axis of one rank
            has none.
    """

    grid: Grid
    rank: int
    global_ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    groups: dict[Channel, dist.ProcessGroup]

    def close(self) -> None:
        """Destroy the groups that were made for the grid. Not collective."""
        for group in set(self.groups.values()) - {self.groups.get(("cp", "inputs"))}:
            dist.destroy_process_group(group)


def connect(group: dist.ProcessGroup | None, grid: Grid, *, timeout: timedelta | None = None) -> AxisGroups:
    """Make the groups of a grid inside a context-parallel group.

    Collective over the *world*, like ``torch.distributed.new_group``: every rank of the job enters, each with
    its own context-parallel group and grid. (The local-synchronisation mode of ``new_group`` would spare the
    others, but it derives the name of a group from the number of groups that a rank has, so it hangs as
    soon as two members differ in that: with pipeline stages, for instance.)

    Args:
        group: the context-parallel group; None for the whole world, or for one process without
            torch.distributed.
        grid: its ``cp_size`` must be the group's size.
        timeout: of the groups that are made; torch.distributed's default unless given.

    Raises:
        OptionError: the grid does not fit the group.
    """
    global_ranks = tuple(dist.get_process_group_ranks(group)) if dist.is_initialized() else (0,)
    if grid.cp_size != len(global_ranks):
        raise OptionError("grid", grid, f"axes whose product is the group's size {len(global_ranks)}")
    if not dist.is_initialized():
        return AxisGroups(grid, 0, global_ranks, (gethostname(),), {})
    cp = dist.group.WORLD if group is None else group
    groups = {("cp", kind): cp for kind in KINDS}
    groups |= {(axis, "inputs"): cp for axis in AXES if grid.size_of(axis) == grid.cp_size > 1}
    everyone = _everyone(global_ranks, grid)
    for channel, ranks in _every_subgroup(everyone):
        made = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            groups[channel] = made
    _warm_up(groups)
    hosts = tuple(everyone[rank][2] for rank in global_ranks)
    return AxisGroups(grid, dist.get_rank(cp), global_ranks, hosts, groups)


def _warm_up(groups: dict[Channel, dist.ProcessGroup]) -> None:
    """One small sum over each group.

    NCCL makes a communicator with a group's first operation, and then all members must take part. The published
    permutation leaves some ranks where they are, so that first operation must not be one of its hops. It also
    shows a broken network here and not in the middle of a step.
    """
    for group in dict.fromkeys(groups.values()):
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        dist.all_reduce(torch.zeros(1, device=device), group=group)


def _everyone(global_ranks: tuple[int, ...], grid: Grid) -> list[Member]:
    """Of every rank of the job: its context-parallel group, its grid, its machine."""
    mine = (global_ranks, grid, gethostname())
    everyone: list[Member] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _every_subgroup(everyone: list[Member]) -> list[tuple[Channel, tuple[int, ...]]]:
    """(channel, global ranks) of each group that has to be made anywhere in the job, the same list on every rank."""
    return [
        ((axis, kind), tuple(ranks[member] for member in members))
        for ranks, their_grid in dict.fromkeys((ranks, their_grid) for ranks, their_grid, _ in everyone)
        for axis in AXES
        for kind in KINDS
        # An axis of all ranks has the whole group for its inputs.
        if their_grid.size_of(axis) > 1 and (kind == "results" or their_grid.size_of(axis) < their_grid.cp_size)
        for members in dict.fromkeys(their_grid.neighbours(rank, axis) for rank in range(their_grid.cp_size))
    ]
