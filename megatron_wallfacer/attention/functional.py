"""The public function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call
from megatron_wallfacer.engine.connections import close_groups, connected
from megatron_wallfacer.engine.run import Runtime
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels import select_kernel
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.mask import NO_LIMIT, Mask, window_mask
from megatron_wallfacer.schedule.plan import Plan

Group = dist.ProcessGroup | DeviceMesh | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: Plan | Grid,
    group: Group = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    cu_seqlens: Sequence[int] | None = None,
    cut: Literal["sequence", "document"] = "sequence",
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    kernel: str = "auto",
    keep_gathered_q: bool = False,
    transfers: Literal["direct", "staged"] = "direct",
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
        window_size: how many keys before and after its own position a query sees; -1 is no limit. With ``causal``
            none after it.
        cu_seqlens: where the documents of a packed sequence begin and end, from 0 to all tokens; they do not see each
            other. Of any length; a batch of one sequence only.
        cut: what is laid out zig-zag: the whole ``sequence``, or each ``document`` for itself (its length a multiple of
            2P), as TransformerEngine and Megatron's ``--sft`` have it.
        sinks: ``[q_heads]``, a logit that each query of a head sees beside its keys, with a value of zero. Its gradient
            is that of this rank's rows.
        softcap: c > 0 turns scores s into c tanh(s / c); kernels ``reference`` and ``flash`` only.
        scale: of the scores; head_dim ** -0.5 unless given.
        kernel: one of :data:`megatron_wallfacer.kernels.KERNELS` (``docs/kernels.md``).
        keep_gathered_q: spend memory (the team's queries) instead of a second gather in backward.
        transfers: ``staged`` for messages through host memory over gloo, so that several ranks may share a GPU: to see
            that something works, not for speed.

    Returns:
        bshd ``[batch, tokens / P, q_heads, v_head_dim]``, dtype of q.

    Raises:
        OptionError: shapes, dtype, grid or kernel do not fit.
    """
    _check_shapes(q, k, v)
    plan = Plan(plan) if isinstance(plan, Grid) else plan
    if scale is not None and scale <= 0:
        raise OptionError("scale", scale, "positive: with other scales PyTorch's CPU kernel gives NaN in silence")
    mask = _mask(causal, window_size, cu_seqlens, cut)
    if mask.documents is not None and q.shape[0] > 1:
        raise OptionError("cu_seqlens", f"with a batch of {q.shape[0]}", "given with a batch of one packed sequence")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise OptionError("sinks", tuple(sinks.shape), f"one for each of the {q.shape[2]} query heads")
    chosen = select_kernel(
        kernel,
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        softcap=softcap,
        banded=mask.banded,
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    runtime = Runtime(_transfers(group, plan.grid, transfers, q.device), chosen, scale, softcap=softcap)
    call = Call(plan, runtime, mask=mask, keep_gathered_q=keep_gathered_q)
    return attend(*(x.transpose(0, 1) for x in (q, k, v)), call, sinks=sinks).transpose(0, 1)


def _mask(
    causal: bool, window_size: tuple[int, int], cu_seqlens: Sequence[int] | None, cut: Literal["sequence", "document"]
) -> Mask:
    if min(window_size) < NO_LIMIT:
        raise OptionError("window_size", window_size, "numbers of tokens, -1 for no limit")
    documents = None if cu_seqlens is None else tuple(cu_seqlens)
    return replace(window_mask(window_size, causal), documents=documents, cut=cut)


def forget_groups() -> None:
    """Destroy the process groups that this process made for :func:`attention` and for Megatron.

    On NCCL collective over the members of each group. Not needed at the end of a program: groups are destroyed when the
    interpreter exits, or with the world by ``torch.distributed.destroy_process_group()``.
    """
    close_groups()


def _transfers(group: Group, grid: Grid, kind: str, device: torch.device) -> Transfers:
    if isinstance(group, DeviceMesh):
        group = group.get_group()
    return connected(group, grid, kind, device)


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
