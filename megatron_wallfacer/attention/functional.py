"""The public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from megatron_wallfacer.attention.checks import Group, checked
from megatron_wallfacer.engine.agreement.calls import described, end_call, first_call
from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.connections import close_groups, connected
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan


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
    shard_mode: Literal["sequence", "per_document"] = "sequence",
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    kernel: str = "auto",
    keep_gathered_q: bool = False,
    transfers: Literal["direct", "staged"] = "direct",
) -> Tensor:
    """Return exact attention over a sequence that is split over ranks. Differentiable.

    Rank r of P holds chunks r and 2P-1-r of the 2P equal chunks of the sequence (zig-zag, as Megatron and
    others lay it out). Collective: every rank of ``group`` calls it with the same arguments but q, k, v. The *first*
    call with a group and a grid makes process groups, as ``torch.distributed.new_group`` does, so every rank of
    the *job* has to make one, each with its own group.

    Args:
        q: bshd ``[batch, tokens / P, q_heads, head_dim]``.
        k: bshd ``[batch, tokens / P, kv_heads, head_dim]``; kv_heads divides q_heads.
        v: bshd ``[batch, tokens / P, kv_heads, v_head_dim]``.
        plan: a grid, or a plan from :func:`megatron_wallfacer.schedule.schemes.make_plan`.
        group: the context-parallel process group, or a device mesh of one dimension; None for the world.
        causal: mask keys after the query's position in the whole sequence; else full attention.
        window_size: how many keys before and after its own position a query sees; -1 is no limit. With ``causal``
            none after it.
        cu_seqlens: boundaries of the documents of a packed sequence, from 0 to the tokens of all ranks; documents do
            not see each other. Of any length, 0 too; a batch of one sequence only. A tensor on a GPU is waited for.
        shard_mode: layout of documents. ``sequence``: the whole sequence is divided into 2P chunks. ``per_document``:
            each document is, and its length is a multiple of 2P, as in TransformerEngine and with Megatron's ``--sft``.
        sinks: ``[q_heads]``, a logit that each query of a head sees beside its keys, with a value of zero. Its gradient
            is that of this rank's rows.
        softcap: c > 0 turns scores s into c tanh(s / c); kernels ``reference`` and ``flash`` only.
        scale: of the scores; head_dim ** -0.5 unless given.
        kernel: one of :data:`megatron_wallfacer.kernels.KERNELS` (``docs/kernels.md``).
        keep_gathered_q: spend memory (the team's queries) instead of a second gather in backward.
        transfers: ``staged`` for messages through host memory over gloo, so that several ranks may share a GPU: to see
            that something works, not for speed.

    Returns:
        bshd ``[batch, tokens / P, q_heads, v_head_dim]``, dtype of q. Without tokens it is empty.

    Raises:
        OptionError: an argument has a type or a value that is not allowed. All are checked before the first message,
            in the order of causes, so that all ranks of a call with the same arguments raise the same error.
        DisagreementError: in one of the first 64 calls of a group, ranks have different arguments, or another rank
            rejects its own or fails in its checks. The same lines on every rank.
        WallfacerError: another rank failed in this call, or any rank in an earlier one.
    """
    first = first_call(group)
    try:
        plan, cp_group, mask, chosen, scale, softcap = checked(
            q, k, v, plan, group, causal, window_size, cu_seqlens, shard_mode, sinks, softcap, scale, kernel,
            keep_gathered_q, transfers,
        )  # fmt: skip
    except BaseException as error:
        end_call(first, group, error)
        raise
    if first is not None:
        options = {"sinks": sinks is not None, "keep_gathered_q": keep_gathered_q, "transfers": transfers}
        first.compare(
            described(q, k, v, plan, mask, causal, window_size, shard_mode, scale, softcap, chosen.name, options)
        )
    if not q.numel():
        return empty_output(q, k, v, sinks)
    try:
        groups = connected(cp_group, plan.grid, transfers, q.device)
    except BaseException as error:
        end_call(None, group, error)
        raise
    runtime = Runtime(groups, chosen, scale, softcap=softcap)
    call = Call(plan, runtime, mask=mask, keep_gathered_q=keep_gathered_q)
    return attend(*(x.transpose(0, 1) for x in (q, k, v)), call, sinks=sinks).transpose(0, 1)


def empty_output(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the output of a batch or a sequence of none, ``[batch, tokens / P, q_heads, v_head_dim]``.

    It depends on its inputs, so that each gets a gradient: empty for q, k and v, zeros for sinks.
    """
    # Sums of nothing are 0. A product would give NaN where a sink is not finite.
    total = q.sum() + k.sum() + v.sum()
    if sinks is not None:
        total = total + sinks[:0].sum().to(q.dtype)
    return q.new_empty((*q.shape[:3], v.shape[3])) + total


def forget_groups() -> None:
    """Destroy the process groups that this process made for :func:`attention` and for Megatron.

    On NCCL collective over the members of each group. Not needed at the end of a program: groups are destroyed when the
    interpreter exits, or with the world by ``torch.distributed.destroy_process_group()``.
    """
    close_groups()
