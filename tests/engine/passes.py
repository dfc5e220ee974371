"""Passes on workers, and how far what they give is from dense attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from megatron_wallfacer.attention import attention, forget_groups
from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.connections import connected
from megatron_wallfacer.engine.timeline import Observer, no_observer
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.kernels import select_kernel
from megatron_wallfacer.kernels.protocol import Kernel
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.mask import Mask, chunk_mask_of
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape
from tests.support.dense import Problem, dense, relative_error

TENSORS = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One problem under one plan."""

    plan: Plan
    problem: Problem
    keep_gathered_q: bool = False
    kernel: str = "torch"

    @property
    def groups(self) -> int:
        """Head groups that are really made."""
        return head_groups(self.plan, self.problem.q_heads, self.problem.kv_heads)

    def schedules(self, rank: int) -> tuple[Schedule, Schedule]:
        """Forward and backward of a rank."""
        options = {"causal": self.problem.causal, "groups": self.groups, "keep_gathered_q": self.keep_gathered_q}
        options["chunk_mask"] = chunk_mask_of(mask_of(self.problem), self.problem.cp_size, self.problem.chunk)
        return forward_schedule(self.plan, rank, **options), backward_schedule(self.plan, rank, **options)

    @property
    def shape(self) -> Shape:
        """Sizes of a rank's shard."""
        problem, size = self.problem, self.problem.dtype.itemsize
        return Shape(
            2 * problem.chunk,
            problem.q_heads,
            problem.kv_heads,
            problem.head_dim,
            batch=problem.batch,
            itemsize=size,
            accumulate_itemsize=max(4, size),
        )


def mask_of(problem: Problem) -> Mask:
    """The mask of a problem as the engine knows it."""
    left, right = (None if side == -1 else side for side in problem.window)
    return Mask(left, 0 if problem.causal else right, problem.documents, problem.shard_mode)


def leaves(rank: int, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """On a worker: q, k, v, which want gradients, and dout, in sbhd."""
    q, k, v, dout = (problem.shard(x, rank).transpose(0, 1).contiguous() for x in problem.tensors())
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def call_of(
    case: Case, transfers: Transfers, kernel: Kernel | None = None, observer: Observer = no_observer, scale: float = 0.3
) -> Call:
    """A call of the engine below the public function."""
    runtime = Runtime(transfers, kernel or TorchCpuKernel(), scale, observer)
    return Call(case.plan, runtime, mask=mask_of(case.problem), keep_gathered_q=case.keep_gathered_q)


def run_case(rank: int, case: Case, group: object = None) -> list[np.ndarray]:
    """On a worker: this rank's out, dq, dk, dv, by the public function."""
    q, k, v, dout = (case.problem.shard(x, rank) for x in case.problem.tensors())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    problem, sinks = case.problem, case.problem.sink_logits()
    options = {"causal": problem.causal, "keep_gathered_q": case.keep_gathered_q, "window_size": problem.window}
    options |= {"cu_seqlens": problem.documents, "shard_mode": problem.shard_mode, "softcap": problem.softcap}
    options |= {"kernel": "reference" if problem.softcap else case.kernel}
    if sinks is not None:
        options["sinks"] = sinks.requires_grad_()
    if problem.documents is not None and problem.documents[-1] < problem.tokens:
        out = _padded_attention(case, q, k, v, sinks, group=group)
    else:
        out = attention(q, k, v, plan=case.plan, group=group, **options)
    out.backward(dout)
    grads = (q.grad, k.grad, v.grad, *(() if sinks is None else (sinks.grad,)))
    # numpy: torch would send each tensor as a file descriptor of its own.
    return [x.detach().double().numpy() for x in (out, *grads)]


def _padded_attention(case: Case, *tensors: Tensor | None, group: object) -> Tensor:
    """Attention where padding follows the last document: only the public function rejects that."""
    *qkv, sinks = tensors
    mask, device = mask_of(case.problem), torch.device("cpu")
    q, _, v = qkv
    sizes = {"head_dim": q.shape[3], "v_head_dim": v.shape[3], "window": mask.has_window}
    kernel = select_kernel(case.kernel, device=device, dtype=q.dtype, **sizes)
    runtime = Runtime(connected(group, case.plan.grid, "direct", device), kernel, q.shape[3] ** -0.5)
    call = Call(case.plan, runtime, mask=mask, keep_gathered_q=case.keep_gathered_q)
    return attend(*(x.transpose(0, 1) for x in qkv), call, sinks=sinks).transpose(0, 1)


def run_cases(rank: int, cases: Sequence[Case]) -> list[list[np.ndarray]]:
    """On a worker: case after case; groups are dropped where the next case has another grid."""
    results = []
    for index, case in enumerate(cases):
        results.append(run_case(rank, case))
        if index + 1 == len(cases) or cases[index + 1].plan.grid != case.plan.grid:
            forget_groups()
    return results


reference = cache(dense)


def errors(problem: Problem, ranks: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
    """Largest relative error over ranks, by tensor."""
    return {
        name: max(
            relative_error(torch.from_numpy(ranks[rank][index]), problem.shard(whole, rank))
            for rank in range(problem.cp_size)
        )
        for index, (name, whole) in enumerate(zip(TENSORS, reference(problem)[: len(TENSORS)], strict=True))
    }
