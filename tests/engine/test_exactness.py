"""Exact: every grid, placement, mask and head count against dense attention in fp64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from megatron_wallfacer.attention import attention, forget_groups
from megatron_wallfacer.schedule.grid import RINGS_ADJACENT, TEAMS_ADJACENT, Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schemes import divisors
from tests.support.dense import Problem, dense, relative_error
from tests.support.pool import Pool

SIZES = (1, 2, 3, 4, 6, 8, 9, 12, 16)
HEADS = ((4, 4), (4, 2), (4, 1))
AXES = [(team, kv, p // team // kv) for p in SIZES for team in divisors(p) for kv in divisors(p // team)]


def plans(axes: tuple[int, int, int]) -> list[Plan]:
    """Every schedule that exists for these axes: both placements, and the published order where team = kv_team."""
    grids = [Grid(*axes, placement=placement) for placement in (TEAMS_ADJACENT, RINGS_ADJACENT)]
    native = [Plan(grid) for grid in grids]
    published = [Plan(grid, "wallfacer", "paper", "q") for grid in grids if grid.team == grid.kv_team]
    return native + published


def run_problem(rank: int, problem: Problem, plan: Plan, keep_gathered_q: bool, kernel: str) -> list[np.ndarray]:
    """On a worker: this rank's out, dq, dk, dv."""
    q, k, v, dout = (problem.shard(x, rank) for x in problem.tensors())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, plan=plan, causal=problem.causal, kernel=kernel, keep_gathered_q=keep_gathered_q)
    out.backward(dout)
    # numpy: torch would send each tensor as a file descriptor of its own.
    return [x.detach().double().numpy() for x in (out, q.grad, k.grad, v.grad)]


def run_problems(rank: int, problems: list[Problem], plans: list[Plan], **options: object) -> list[list[np.ndarray]]:
    """On a worker: every problem under every plan; groups are dropped after each plan."""
    results = []
    for plan in plans:
        results += [run_problem(rank, problem, plan, False, "torch") for problem in problems]
        forget_groups()
    return results


reference = cache(dense)


def errors(problem: Problem, ranks: list[list[np.ndarray]]) -> dict[str, float]:
    """Largest relative error over ranks, by tensor."""
    return {
        name: max(
            relative_error(torch.from_numpy(ranks[rank][index]), problem.shard(whole, rank))
            for rank in range(problem.cp_size)
        )
        for index, (name, whole) in enumerate(zip(("out", "dq", "dk", "dv"), reference(problem), strict=True))
    }


@pytest.mark.parametrize("axes", AXES, ids=lambda axes: "x".join(map(str, axes)))
def test_fp64_matches_dense_attention(pools: Callable[[int], Pool], axes: tuple[int, int, int]) -> None:
    cp_size = axes[0] * axes[1] * axes[2]
    problems = [
        Problem(cp_size, batch=batch, q_heads=q_heads, kv_heads=kv_heads, causal=causal)
        for q_heads, kv_heads in HEADS
        for batch in (1, 3)
        for causal in (True, False)
    ]
    cases = [(plan, problem) for plan in plans(axes) for problem in problems]
    ranks = pools(cp_size).run(run_problems, problems, plans(axes))
    for index, (plan, problem) in enumerate(cases):
        worst = errors(problem, [results[index] for results in ranks])
        assert max(worst.values()) <= 1e-12, (plan, problem, worst)
