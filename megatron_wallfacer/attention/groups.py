"""The context-parallel group of :func:`megatron_wallfacer.attention.attention`, checked before anything is sent."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_wallfacer.attention.values import shown
from megatron_wallfacer.engine.backends import check_alive
from megatron_wallfacer.engine.groups import check_size
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import Grid

Group = dist.ProcessGroup | DeviceMesh | None


def group_of(group: object, grid: Grid) -> dist.ProcessGroup | None:
    """Return the process group of a group, a device mesh or None.

    Args:
        group: process group or mesh of one dimension that this rank is in; None for the world.
        grid: its ``cp_size`` must be the group's size.

    Raises:
        OptionError: it is none of these, or has another size.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise OptionError(
                "group", f"a mesh of {group.ndim} dimensions", "a mesh of one dimension, such as mesh['cp']"
            )
        if group.get_coordinate() is None:
            raise OptionError("group", "a mesh of other ranks", "a mesh that this rank is in")
        group = group.get_group()
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise OptionError("group", "a group of other ranks", "a process group that this rank is in")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise OptionError("group", shown(group), "a process group, a DeviceMesh of one dimension, or None")
    if group is not None:
        check_alive(group)
    check_size(dist.get_world_size(group) if dist.is_initialized() else 1, grid)
    return group
