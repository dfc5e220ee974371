"""What a pass holds while it computes is what the schedule says that it holds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_wallfacer.engine.autograd import Call, attend
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.runtime import Runtime
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape, buffer_bytes
from tests.support.dense import Problem
from tests.support.pool import Pool

PLANS = {
    "ring": make_plan("ring", 8),
    "ring of two": Plan(Grid(team=4, ring=2)),
    "team-ring": make_plan("team-ring", 8, team_size=2),
    "kv_team x ring": Plan(Grid(kv_team=2, ring=4)),
    "mesh": Plan(Grid(team=2, kv_team=4)),
    "wallfacer": make_plan("wallfacer", 8, team_size=2),
}
#: Delta and lse of the rank's own tokens, and other things of one number a head.
SMALL = 1.05
LOOKS = 10


def alive(known: set[int]) -> int:
    """Bytes of the tensors that have come to life since ``gc.freeze()``, but for storages known before."""
    tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor]
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(size for pointer, size in sizes.items() if pointer not in known)


class Spy(TorchCpuKernel):
    """Notes, at each call, the bytes that have come to life in this pass."""

    known: set[int]
    most = 0

    def _note(self) -> None:
        least = alive(self.known)
        for _ in range(LOOKS):
            if least <= self.most:
                return
            # gloo's threads let go of what they have sent a moment after the wait for it is over.
            time.sleep(0.002)
            least = min(least, alive(self.known))
        self.most = least

    def forward(self, *args: Tensor, **kwargs: float) -> tuple[Tensor, Tensor]:
        self._note()
        return super().forward(*args, **kwargs)

    def backward(self, *args: Tensor, **kwargs: float) -> tuple[Tensor, Tensor, Tensor]:
        self._note()
        return super().backward(*args, **kwargs)


def run_spied(rank: int, problem: Problem, plan: Plan) -> tuple[int, int]:
    """On a worker: most bytes alive at a kernel call, forward and backward."""
    groups = connect(None, plan.grid)
    spy = Spy()
    q, k, v, dout = (problem.shard(x, rank).transpose(0, 1).contiguous() for x in problem.tensors())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    spy.known = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    gc.freeze()
    out = attend(q, k, v, Call(plan, Runtime(Transfers(groups), spy, 0.3)))
    forward, spy.most = spy.most, 0
    spy.known = {x.untyped_storage().data_ptr() for x in (q, k, v, dout, out, *out.grad_fn.saved_tensors)}
    gc.freeze()
    out.backward(dout)
    gc.unfreeze()
    groups.close()
    return forward, spy.most


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_buffers_alive_at_a_kernel_call_are_those_counted(pools: Callable[[int], Pool], plan: Plan) -> None:
    problem = Problem(8, chunk=16, kv_heads=2, head_dim=64, dtype=torch.float32)
    shape = Shape(32, problem.q_heads, problem.kv_heads, 64, itemsize=4, accumulate_itemsize=4)
    for rank, (forward, backward) in enumerate(pools(8).run(run_spied, problem, plan)):
        assert forward <= SMALL * buffer_bytes(forward_schedule(plan, rank), shape)
        assert backward <= SMALL * buffer_bytes(backward_schedule(plan, rank), shape)
