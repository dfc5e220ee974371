"""Single and half precision against dense attention in fp64 on the same rounded inputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from megatron_wallfacer.kernels.protocol import AttnSpec
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.grid import RINGS_ADJACENT, Grid
from megatron_wallfacer.schedule.plan import Plan
from tests.engine.passes import TENSORS, Case, errors, reference, run_cases
from tests.support.dense import Problem
from tests.support.pool import Pool

SCHEMES = {
    "ring": Plan(Grid(ring_outer=8)),
    "tokenring": Plan(Grid(ring_outer=8), forward="pass-q"),
    "burst": Plan(Grid(ring_outer=4, ring_inner=2), backward="pass-q"),
    "loongtrain": Plan(Grid(head=2, ring_outer=2, ring_inner=2)),
    "team-ring": Plan(Grid(team=2, ring_outer=4), backward="pass-q", head_groups=2),
    "wallfacer": Plan(Grid(team=2, kv_team=2, ring_outer=2), kv_order="paper", backward="pass-q"),
    "all-gather": Plan(Grid(kv_team=8)),
}
GRIDS = SCHEMES | {
    "team x kv_team x ring": Plan(Grid(team=2, kv_team=2, ring_outer=2, placement=RINGS_ADJACENT)),
    "bidirectional": Plan(Grid(ring_outer=8), bidirectional=True),
    "one team": Plan(Grid(team=8)),
    "heads only": Plan(Grid(head=8)),
}


def rms_errors(problem: Problem, ranks: list[list[np.ndarray]]) -> dict[str, float]:
    """Root mean square of the error over that of the tensor, by tensor: it hangs less on the CPU than the largest."""
    found = {}
    for index, (name, whole) in enumerate(zip(TENSORS, reference(problem), strict=True)):
        wanted = np.concatenate([problem.shard(whole, rank).numpy() for rank in range(problem.cp_size)])
        got = np.concatenate([results[index] for results in ranks])
        found[name] = float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))
    return found


def single_process(problem: Problem) -> list[list[np.ndarray]]:
    """What the kernel makes of the whole sequence in one process, cut into the shards of the ranks."""
    q, k, v, dout = (x.transpose(0, 1).contiguous() for x in problem.tensors())
    rows = (0, len(q))
    call = AttnTile(rows, rows, problem.causal), AttnSpec(problem.head_dim**-0.5)
    kernel = TorchCpuKernel()
    out, lse = kernel.forward(q, k, v, *call)
    found = (out, *kernel.backward(dout, q, k, v, out, lse, *call))
    return [[problem.shard(x.transpose(0, 1), rank).double().numpy() for x in found] for rank in range(problem.cp_size)]


def ran(pools: Callable[[int], Pool], problem: Problem, plans: dict[str, Plan]) -> dict[str, list[list[np.ndarray]]]:
    """Results by plan and rank, of one job."""
    ranks = pools(8).run(run_cases, [Case(plan, problem) for plan in plans.values()])
    return {name: [results[index] for results in ranks] for index, name in enumerate(plans)}


@pytest.fixture(scope="module", params=[True, False], ids=["causal", "full"])
def single(request: pytest.FixtureRequest, pools: Callable[[int], Pool]) -> tuple[Problem, dict]:
    problem = Problem(
        8, chunk=8, batch=2, q_heads=8, kv_heads=4, head_dim=32, causal=request.param, dtype=torch.float32
    )
    return problem, ran(pools, problem, GRIDS)


@pytest.fixture(scope="module", params=[True, False], ids=["causal", "full"])
def half(request: pytest.FixtureRequest, pools: Callable[[int], Pool]) -> tuple[Problem, dict]:
    problem = Problem(8, chunk=32, kv_heads=2, head_dim=64, causal=request.param, dtype=torch.bfloat16)
    return problem, ran(pools, problem, SCHEMES)


@pytest.mark.parametrize("plan", GRIDS)
def test_fp32_is_within_1e_5(single: tuple[Problem, dict], plan: str) -> None:
    problem, results = single
    found = errors(problem, results[plan])
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("plan", SCHEMES)
@pytest.mark.parametrize("measure", [rms_errors, errors])
def test_bf16_errs_at_most_twice_as_much_as_one_process(
    half: tuple[Problem, dict], plan: str, measure: Callable[..., dict[str, float]]
) -> None:
    problem, results = half
    found, alone = measure(problem, results[plan]), measure(problem, single_process(problem))
    assert all(found[name] <= 2 * alone[name] for name in alone), (found, alone)
