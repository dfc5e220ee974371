"""The autograd function: what it keeps, what it gives, and what it rejects."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.volume import rows_bytes
from tests.engine.passes import Case, call_of, leaves
from tests.support.dense import Problem
from tests.support.pool import Pool

WITH_TEAMS = {
    "team-ring": Plan(Grid(team=2, ring_outer=4)),
    "team-ring, pass-q": Plan(Grid(team=2, ring_outer=4), forward="pass-q", backward="pass-q", head_groups=2),
    "wallfacer": Plan(Grid(team=2, kv_team=2, ring_outer=2), kv_order="paper", backward="pass-q"),
    "mesh": Plan(Grid(team=4, kv_team=2)),
    "head x team x ring": Plan(Grid(head=2, team=2, ring_outer=2)),
}
PLANS = WITH_TEAMS | {
    "ring": Plan(Grid(ring_outer=8)),
    "loongtrain": Plan(Grid(head=2, ring_outer=2, ring_inner=2)),
    "usp, two head groups": Plan(Grid(head=2, ring_outer=4), forward="pass-q", head_groups=2),
}
SHARDED = Problem(8, q_heads=8, kv_heads=4, dtype=torch.float32)


def run_both(rank: int, problem: Problem, plan: Plan) -> dict[bool, tuple[list[np.ndarray], dict, dict]]:
    """On a worker, with and without keeping the gathered queries: results, bytes of the forward, of the backward."""
    groups = connect(None, plan.grid)
    results = {}
    for keep in (False, True):
        transfers = Transfers(groups)
        q, k, v, dout = leaves(rank, problem)
        out = attend(q, k, v, call_of(Case(plan, problem, keep), transfers))
        forward = transfers.received.copy()
        out.backward(dout)
        arrays = [x.detach().double().numpy() for x in (out, q.grad, k.grad, v.grad)]
        results[keep] = arrays, dict(forward), dict(transfers.received - forward)
    groups.close()
    return results


@pytest.fixture(scope="module", params=WITH_TEAMS.values(), ids=list(WITH_TEAMS))
def both(request: pytest.FixtureRequest, pools: Callable[[int], Pool]) -> tuple[Plan, Problem, list[dict]]:
    return request.param, SHARDED, pools(8).run(run_both, SHARDED, request.param)


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


# --- what is saved between the passes ---


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of each storage, by address."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def run_saved(rank: int, cases: list[Case]) -> list[dict[str, int]]:
    """On a worker, of each case: bytes alive between the passes and after them, besides what the caller holds."""
    return [_saved(rank, case) for case in cases]


def _saved(rank: int, case: Case) -> dict[str, int]:
    groups = connect(None, case.plan.grid)
    q, k, v, dout = leaves(rank, case.problem)
    call = call_of(case, Transfers(groups))
    # The first run makes the constants of the compiled passes.
    attend(q, k, v, call).backward(dout)
    q.grad = k.grad = v.grad = None
    gc.freeze()
    out = attend(q, k, v, call)
    saved, inputs = storages(list(out.grad_fn.saved_tensors)), storages([q, k, v])
    between = _alive()
    out.backward(dout)
    after = _alive()
    gc.unfreeze()
    groups.close()
    return {
        "saved": sum(size for at, size in saved.items() if at not in inputs),
        "inputs saved": sum(size for at, size in saved.items() if at in inputs),
        "out is saved": out.untyped_storage().data_ptr() in saved,
        "alive besides what is saved": sum(size for at, size in between.items() if at not in saved | inputs),
        "alive after": sum(size for at, size in after.items() if at not in storages([out, q.grad, k.grad, v.grad])),
    }


def _alive() -> dict[int, int]:
    """Storages of the tensors that have come to life since ``gc.freeze()``."""
    return storages([thing for thing in gc.get_objects() if type(thing) is Tensor])


@pytest.fixture(scope="module", params=[False, True], ids=["gathered again", "kept"])
def saved(request: pytest.FixtureRequest, pools: Callable[[int], Pool]) -> dict[str, tuple[Case, list[dict]]]:
    cases = {name: Case(plan, SHARDED, request.param) for name, plan in PLANS.items()}
    ranks = pools(8).run(run_saved, list(cases.values()))
    return {name: (case, [results[index] for results in ranks]) for index, (name, case) in enumerate(cases.items())}


@pytest.mark.parametrize("name", PLANS)
def test_saved_are_output_statistics_and_what_the_schedule_keeps(
    saved: dict[str, tuple[Case, list[dict]]], name: str
) -> None:
    case, ranks = saved[name]
    for rank, found in enumerate(ranks):
        schedule, shape = case.schedules(rank)[0], case.shape
        kept = [schedule.values[value] for value in schedule.keeps]
        blocks = sum(rows_bytes(schedule, shape, value.payload, len(value.chunks)) for value in kept)
        assert found["out is saved"]
        assert found["saved"] == shape.bytes("out") + shape.bytes("lse") + blocks
        # On a head axis backward reads what was exchanged.
        local = 0 if case.plan.grid.head > 1 else sum(shape.bytes(tensor) for tensor in "qkv")
        assert found["inputs saved"] == local


@pytest.mark.parametrize("name", PLANS)
def test_nothing_but_what_is_saved_outlives_forward(saved: dict[str, tuple[Case, list[dict]]], name: str) -> None:
    assert [found["alive besides what is saved"] for found in saved[name][1]] == [0] * 8


@pytest.mark.parametrize("name", PLANS)
def test_nothing_but_results_outlives_backward(saved: dict[str, tuple[Case, list[dict]]], name: str) -> None:
    assert [found["alive after"] for found in saved[name][1]] == [0] * 8


# --- what it gives ---


def run_twice(rank: int, cases: list[Case]) -> list[list[bool]]:
    """On a worker: whether a second call gives bit for bit what the first gave."""
    found = []
    for case in cases:
        call = call_of(case, Transfers(connect(None, case.plan.grid)))
        results = []
        for _ in range(2):
            q, k, v, dout = leaves(rank, case.problem)
            out = attend(q, k, v, call)
            out.backward(dout)
            results.append((out.detach(), q.grad, k.grad, v.grad))
        call.runtime.transfers.groups.close()
        found.append([torch.equal(first, second) for first, second in zip(*results, strict=True)])
    return found


def test_same_call_gives_the_same_bits(pools: Callable[[int], Pool]) -> None:
    problem = Problem(8, chunk=8, q_heads=8, kv_heads=4, dtype=torch.bfloat16)
    ranks = pools(8).run(run_twice, [Case(plan, problem) for plan in PLANS.values()])
    assert ranks == [[[True] * 4] * len(PLANS)] * 8


def run_interleaved(rank: int, case: Case) -> list[bool]:
    """On a worker: two forwards and then their backwards give what one after the other gives."""
    call = call_of(case, Transfers(connect(None, case.plan.grid)))
    apart, together = [], [leaves(rank, case.problem) for _ in range(2)]
    for factor in (1, 2):
        q, k, v, dout = leaves(rank, case.problem)
        attend(q, k, v, call).backward(factor * dout)
        apart.append((q.grad, k.grad, v.grad))
    outs = [attend(q, k, v, call) for q, k, v, _ in together]
    for factor, out in ((1, outs[0]), (2, outs[1])):
        out.backward(factor * together[0][3])
    call.runtime.transfers.groups.close()
    return [
        torch.equal(x.grad, grad)
        for some, grads in zip(together, apart, strict=True)
        for x, grad in zip(some, grads, strict=False)
    ]


@pytest.mark.parametrize("name", ["ring", "head x team x ring"])
def test_several_layers_keep_their_own(pools: Callable[[int], Pool], name: str) -> None:
    assert pools(8).run(run_interleaved, Case(PLANS[name], SHARDED, True)) == [[True] * 6] * 8


def alone(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    case = Case(Plan(Grid()), Problem(1, dtype=dtype))
    *tensors, _ = leaves(0, case.problem)
    return tensors, attend(*tensors, call_of(case, Transfers(connect(None, Grid()))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_have_the_dtype_of_their_inputs(dtype: torch.dtype) -> None:
    tensors, out = alone(dtype)
    out.sum().backward()
    assert [tensor.grad.dtype for tensor in tensors] == [dtype] * 3


def test_second_derivative_is_rejected() -> None:
    tensors, out = alone(torch.float64)
    (dq,) = torch.autograd.grad(out.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_a_second_backward_is_rejected() -> None:
    _, out = alone(torch.float64)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_heads_that_do_not_divide_are_rejected() -> None:
    case = Case(Plan(Grid(head=3)), Problem(3))
    q, k, v, _ = leaves(0, case.problem)
    with pytest.raises(OptionError, match=r"head_size=3: must be one of 1, 2, 4 for 4 query and 4 kv heads"):
        attend(q, k, v, call_of(case, Transfers(connect(None, Grid()))))
