"""All checks of the arguments of :func:`megatron_wallfacer.attention.attention`."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megatron_wallfacer.attention.tensors import check_sinks, check_tensors
from megatron_wallfacer.attention.values import check_name, check_switch, mask_of, plan_of, scale_of, shown, softcap_of
from megatron_wallfacer.engine.groups import check_alive, check_size
from megatron_wallfacer.engine.staged import TRANSFERS
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels import KERNELS, Kernel, select_kernel
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.heads import check_heads
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.mask import Mask
from megatron_wallfacer.schedule.plan import Plan

Group = dist.ProcessGroup | DeviceMesh | None


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: object,
    group: object,
    causal: bool,
    window_size: object,
    cu_seqlens: object,
    shard_mode: object,
    sinks: object,
    softcap: object,
    scale: object,
    kernel: str,
    keep_gathered_q: object,
    transfers: str,
) -> tuple[Plan, dist.ProcessGroup | None, Mask, Kernel, float, float]:
    """Check the arguments of :func:`attention`, and return plan, group, mask, kernel, scale and softcap of the call.

    The checks need no other rank. Ranks with equal arguments raise the same error.

    Raises:
        OptionError: An argument has a type or a value that is not allowed.
    """
    plan = plan_of(plan)
    check_tensors(q, k, v)
    cp_group = group_of(group, plan.grid)
    mask = mask_of(causal, window_size, cu_seqlens, shard_mode, plan.grid.cp_size, plan.grid.cp_size * q.shape[1])
    if mask.documents is not None and q.shape[0] > 1:
        raise OptionError("batch", q.shape[0], "1 with cu_seqlens")
    if q.shape[1] % CHUNKS_PER_RANK:
        raise OptionError("tokens", q.shape[1], f"a multiple of {CHUNKS_PER_RANK} on each rank")
    check_sinks(sinks, q)
    softcap, scale = softcap_of(softcap), scale_of(scale, q.shape[3])
    check_switch("keep_gathered_q", keep_gathered_q)
    check_name("kernel", kernel, KERNELS)
    check_name("transfers", transfers, TRANSFERS)
    check_heads(plan, q.shape[2], k.shape[2])
    dims = {"head_dim": q.shape[3], "v_head_dim": v.shape[3]}
    chosen = select_kernel(kernel, device=q.device, dtype=q.dtype, **dims, softcap=softcap, window=mask.has_window)
    return plan, cp_group, mask, chosen, scale, softcap


def group_of(group: object, grid: Grid) -> dist.ProcessGroup | None:
    """Return the process group of the argument ``group``; None for the world.

    Raises:
        OptionError: The type is not supported, this rank is not in the group, or group and grid differ in size.
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
