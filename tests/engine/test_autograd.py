from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from megatron_wallfacer.engine.autograd import Call, attend
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.runtime import Runtime
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.kernels import select_kernel
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schemes import make_plan
from tests.support.dense import Problem
from tests.support.pool import Pool

WITH_TEAMS = {
    "team-ring": make_plan("team-ring", 8, team_size=2),
    "wallfacer": make_plan("wallfacer", 8, team_size=2),
    "mesh": make_plan("team-ring", 8, team_size=4, kv_team_size=2),
}


def run_both(rank: int, problem: Problem, plan: Plan) -> dict[bool, tuple[list[np.ndarray], dict, dict]]:
    """On a worker, with and without keeping the gathered queries: results, bytes of the forward, of the backward."""
    kernel = select_kernel("torch", device=torch.device("cpu"), dtype=problem.dtype, head_dim=problem.head_dim)
    groups = connect(None, plan.grid)
    results = {}
    for keep in (False, True):
        transfers = Transfers(groups)
        call = Call(plan, Runtime(transfers, kernel, 0.3), causal=problem.causal, keep_gathered_q=keep)
        q, k, v, dout = (problem.shard(x, rank).transpose(0, 1).contiguous() for x in problem.tensors())
        out = attend(*(x.requires_grad_() for x in (q, k, v)), call)
        forward = transfers.received.copy()
        out.backward(dout)
        arrays = [x.detach().double().numpy() for x in (out, q.grad, k.grad, v.grad)]
        results[keep] = arrays, dict(forward), dict(transfers.received - forward)
    groups.close()
    return results


@pytest.fixture(scope="module", params=WITH_TEAMS.values(), ids=list(WITH_TEAMS))
def both(request: pytest.FixtureRequest, pools: Callable[[int], Pool]) -> tuple[Plan, Problem, list[dict]]:
    problem = Problem(8, kv_heads=2, dtype=torch.float32)
    return request.param, problem, pools(8).run(run_both, problem, request.param)


def test_kept_queries_give_the_same_gradients(both: tuple[Plan, Problem, list[dict]]) -> None:
    for results in both[2]:
        for kept, gathered in zip(results[True][0], results[False][0], strict=True):
            assert np.array_equal(kept, gathered)


def test_kept_queries_save_the_gather_of_the_queries_in_backward(both: tuple[Plan, Problem, list[dict]]) -> None:
    plan, problem, ranks = both
    shard = 2 * problem.chunk * problem.batch * problem.q_heads * problem.head_dim * 4
    for results in ranks:
        (_, _, gathered), (_, _, kept) = results[False], results[True]
        assert sum(gathered.values()) - sum(kept.values()) == (plan.grid.team - 1) * shard
        assert ("team", "q") in gathered.keys() - kept.keys()


def test_kept_queries_change_nothing_in_forward(both: tuple[Plan, Problem, list[dict]]) -> None:
    for results in both[2]:
        assert results[False][1] == results[True][1]


def run_twice(rank: int, problem: Problem, plan: Plan) -> list[bool]:
    """On a worker: whether a second call gives bit for bit what the first gave."""
    kernel = select_kernel("torch", device=torch.device("cpu"), dtype=problem.dtype, head_dim=problem.head_dim)
    groups = connect(None, plan.grid)
    call = Call(plan, Runtime(Transfers(groups), kernel, 0.3))
    results = []
    for _ in range(2):
        q, k, v, dout = (problem.shard(x, rank).transpose(0, 1).contiguous() for x in problem.tensors())
        out = attend(*(x.requires_grad_() for x in (q, k, v)), call)
        out.backward(dout)
        results.append((out.detach(), q.grad, k.grad, v.grad))
    groups.close()
    return [torch.equal(first, second) for first, second in zip(*results, strict=True)]


@pytest.mark.parametrize("plan", WITH_TEAMS.values(), ids=list(WITH_TEAMS))
def test_same_call_gives_the_same_bits(pools: Callable[[int], Pool], plan: Plan) -> None:
    problem = Problem(8, chunk=8, dtype=torch.bfloat16)
    assert all(all(same) for same in pools(8).run(run_twice, problem, plan))


def test_gradients_have_the_dtype_of_their_inputs() -> None:
    plan = make_plan("ring", 1)
    kernel = select_kernel("torch", device=torch.device("cpu"), dtype=torch.bfloat16, head_dim=8)
    call = Call(plan, Runtime(Transfers(connect(None, plan.grid)), kernel, 0.3))
    tensors = [torch.ones(4, 1, 2, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    attend(*tensors, call).sum().backward()
    assert [tensor.grad.dtype for tensor in tensors] == [torch.bfloat16] * 3


def test_second_derivative_is_refused() -> None:
    plan = make_plan("ring", 1)
    kernel = select_kernel("torch", device=torch.device("cpu"), dtype=torch.float64, head_dim=8)
    call = Call(plan, Runtime(Transfers(connect(None, plan.grid)), kernel, 0.3))
    tensors = [torch.ones(4, 1, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    (dq,) = torch.autograd.grad(attend(*tensors, call).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
