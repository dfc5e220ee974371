"""The public function :func:`attention`."""

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
    """Return exact attention over a sequence that is split over ranks. The result is differentiable.

    Rank r of P holds chunks r and 2P-1-r of the 2P equal chunks of the sequence (zig-zag, as in Megatron). The function
    is collective: every rank of ``group`` calls it with equal arguments except q, k, v. The *first* call for each
    group, grid, device type and value of ``transfers`` creates process groups with ``torch.distributed.new_group``.
    Therefore every rank of the *job* must call this function then, each with its own group.

    Args:
        q: local queries, bshd ``[batch, tokens / P, q_heads, head_dim]``.
        k: local keys, bshd ``[batch, tokens / P, kv_heads, head_dim]``, where kv_heads divides q_heads.
        v: local values, bshd ``[batch, tokens / P, kv_heads, v_head_dim]``.
        plan: grid, or plan from :func:`megatron_wallfacer.schedule.schemes.make_plan`.
        group: context-parallel process group, or device mesh of one dimension; None for the world.
        causal: whether keys after the query's position in the whole sequence are masked.
        window_size: numbers of keys (left, right) that a query sees before and after its position; -1 for no limit. If
            ``causal`` is True, right is always 0.
        cu_seqlens: boundaries of the documents of a packed sequence. They begin with 0 and end with the length of the
            whole sequence. Queries see only keys of their own document. Documents may be empty. The batch size must be
            1. If ``cu_seqlens`` is a tensor on a GPU, the host waits for it.
        shard_mode: layout of documents. ``sequence`` divides the whole sequence into 2P chunks. ``per_document``
            divides each document into 2P chunks, as TransformerEngine and Megatron's ``--sft`` do, so 2P must divide
            the length of each document.
        sinks: one additional logit per head, ``[q_heads]``, whose value vector is zero. The gradient of the sinks
            covers only the local rows.
        softcap: c > 0 replaces each score s by c tanh(s / c). The kernels ``reference`` and ``flash`` support this.
        scale: factor of the scores; head_dim ** -0.5 unless given.
        kernel: name of the kernel, one of :data:`megatron_wallfacer.kernels.KERNELS` (``docs/kernels.md``).
        keep_gathered_q: whether gathered queries are kept for backward. Otherwise backward gathers queries again.
        transfers: ``direct``, or ``staged`` for messages through host memory over gloo. With ``staged`` several ranks
            can share a GPU in functional tests.

    Returns:
        Output of the local rows, bshd ``[batch, tokens / P, q_heads, v_head_dim]``, in the dtype of q.

    Raises:
        OptionError: An argument has a type or a value that is not allowed. All arguments are checked before the first
            message. If all ranks have equal arguments, all ranks raise this error.
        DisagreementError: In one of the first 64 calls of a group, ranks have different arguments, or the checks of
            another rank raised an error. All ranks raise the same message.
        WallfacerError: Another rank failed in this call, or any rank failed in an earlier call.
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
        return _empty_output(q, k, v, sinks)
    try:
        groups = connected(cp_group, plan.grid, transfers, q.device)
    except BaseException as error:
        end_call(None, group, error)
        raise
    runtime = Runtime(groups, chosen, scale, softcap=softcap)
    call = Call(plan, runtime, mask=mask, keep_gathered_q=keep_gathered_q)
    return attend(*(x.transpose(0, 1) for x in (q, k, v)), call, sinks=sinks).transpose(0, 1)


def _empty_output(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """Return an empty output whose autograd graph has an edge to each input, so that backward sets all gradients."""
    # A sum of no elements is 0. A product with an infinite sink would be NaN.
    total = q.sum() + k.sum() + v.sum()
    if sinks is not None:
        total = total + sinks[:0].sum().to(q.dtype)
    return q.new_empty((*q.shape[:3], v.shape[3])) + total


def forget_groups() -> None:
    """Destroy the process groups that this process made for :func:`attention` and for Megatron.

    On NCCL the call is collective over the members of each group. The exit of the interpreter and
    ``torch.distributed.destroy_process_group()`` also destroy the groups.
    """
    close_groups()
