"""The public function."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megatron_wallfacer.engine.autograd import Call, attend
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.run import Runtime
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels import select_kernel
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.plan import Plan

Group = dist.ProcessGroup | DeviceMesh | None

# Making groups is collective and slow, so those of a (world, ranks, grid) are made once. The world is part of the key
# because groups die with it.
_connected: dict[tuple[dist.ProcessGroup | None, tuple[int, ...], Grid], Transfers] = {}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: Plan | Grid,
    group: Group = None,
    causal: bool = True,
    scale: float | None = None,
    kernel: str = "auto",
    keep_gathered_q: bool = False,
) -> Tensor:
    """Exact attention over a sequence that is split over ranks. Differentiable.

    Rank r of P holds chunks r and 2P-1-r of the 2P equal chunks of the sequence (zig-zag, as Megatron and
    others lay it out). Collective: every rank of ``group`` calls it with the same arguments but q, k, v. The *first*
    call with a group and a grid makes process groups, as ``torch.distributed.new_group`` does, so every rank of
    the *job* has to make one, each with its own group.

    Args:
        q: bshd ``[batch, tokens / P, q_heads, head_dim]``.
        k: bshd ``[batch, tokens / P, kv_heads, head_dim]``; kv_heads divides q_heads.
        v: bshd ``[batch, tokens / P, kv_heads, v_head_dim]``.
        plan: a grid, or a plan from :func:`megatron_wallfacer.schedule.schemes.make_plan`.
        group: the context-parallel process group, or a one-dimensional device mesh; None for the world.
        causal: mask keys after the query's position in the whole sequence; else full attention.
        scale: of the scores; head_dim ** -0.5 unless given.
        kernel: ``auto``, ``torch`` or ``reference``.
        keep_gathered_q: spend memory (the team's queries) instead of a second gather in backward.

    Returns:
        bshd ``[batch, tokens / P, q_heads, v_head_dim]``, dtype of q.

    Raises:
        OptionError: shapes, dtype, grid or kernel do not fit.
    """
    _check_shapes(q, k, v)
    plan = Plan(plan) if isinstance(plan, Grid) else plan
    if scale is not None and scale <= 0:
        raise OptionError("scale", scale, "positive: with other scales PyTorch's CPU kernel gives NaN in silence")
    chosen = select_kernel(kernel, device=q.device, dtype=q.dtype, head_dim=q.shape[-1], v_head_dim=v.shape[-1])
    runtime = Runtime(_transfers(group, plan.grid), chosen, q.shape[-1] ** -0.5 if scale is None else scale)
    call = Call(plan, runtime, causal=causal, keep_gathered_q=keep_gathered_q)
    return attend(*(x.transpose(0, 1) for x in (q, k, v)), call).transpose(0, 1)


def forget_groups() -> None:
    """Destroy the process groups that :func:`attention` made."""
    for (world, _, _), transfers in _connected.items():
        if world is _world():
            transfers.groups.close()
    _connected.clear()


def _world() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def _transfers(group: Group, grid: Grid) -> Transfers:
    if isinstance(group, DeviceMesh):
        group = group.get_group()
    ranks = tuple(dist.get_process_group_ranks(group)) if dist.is_initialized() else ()
    key = (_world(), ranks, grid)
    if key not in _connected:
        _connected[key] = Transfers(connect(group, grid))
    return _connected[key]


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise OptionError(name, tuple(tensor.shape), "bshd: batch, tokens, heads, head dim")
        if tensor.dtype != q.dtype or not tensor.is_floating_point():
            raise OptionError(f"{name}.dtype", tensor.dtype, f"one floating-point dtype for all, q has {q.dtype}")
    if q.shape[1] % CHUNKS_PER_RANK:
        raise OptionError("tokens", q.shape[1], f"a multiple of {CHUNKS_PER_RANK} on each rank")
    if k.shape[:3] != v.shape[:3] or k.shape[:2] != q.shape[:2]:
        raise OptionError(
            "k, v", (tuple(k.shape), tuple(v.shape)), f"of the same batch and tokens as q {tuple(q.shape)}"
        )
    if q.shape[2] % k.shape[2] or q.shape[3] != k.shape[3]:
        raise OptionError(
            "k", tuple(k.shape), f"kv heads that divide the q heads, and q's head dim: q is {tuple(q.shape)}"
        )
