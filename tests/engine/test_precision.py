"""Single and half precision against dense attention in fp64 on the same rounded inputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.grid import RINGS_ADJACENT, Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schemes import make_plan
from tests.engine.test_exactness import errors, reference, run_problems
from tests.support.dense import Problem
from tests.support.pool import Pool

SCHEMES = {
    "ring": make_plan("ring", 8),
    "team-ring": make_plan("team-ring", 8, team_size=2),
    "wallfacer": make_plan("wallfacer", 8, team_size=2),
    "all-gather": make_plan("all-gather", 8),
}
GRIDS = SCHEMES | {
    "team x kv_team x ring": Plan(Grid(2, 2, 2, RINGS_ADJACENT)),
    "one team": Plan(Grid(team=8)),
}


def rms_errors(problem: Problem, ranks: list[list[np.ndarray]]) -> dict[str, float]:
    """Root mean square of the error over that of the tensor, by tensor: it hangs less on the CPU than the largest."""
    found = {}
    for index, (name, whole) in enumerate(zip(("out", "dq", "dk", "dv"), reference(problem), strict=True)):
        wanted = np.concatenate([problem.shard(whole, rank).numpy() for rank in range(problem.cp_size)])
        got = np.concatenate([results[index] for results in ranks])
        found[name] = float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))
    return found


def single_process(problem: Problem) -> list[list[np.ndarray]]:
    """What the kernel makes of the whole sequence in one process, cut into the shards of the ranks."""
    q, k, v, dout = (x.transpose(0, 1).contiguous() for x in problem.tensors())
    options = {"causal": problem.causal, "scale": problem.head_dim**-0.5}
    kernel = TorchCpuKernel()
    out, lse = kernel.forward(q, k, v, **options)
    found = (out, *kernel.backward(dout, q, k, v, out, lse, **options))
    return [[problem.shard(x.transpose(0, 1), rank).double().numpy() for x in found] for rank in range(problem.cp_size)]


@pytest.mark.parametrize("plan", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("causal", [True, False])
def test_fp32_is_within_1e_5(pools: Callable[[int], Pool], plan: Plan, causal: bool) -> None:
    problem = Problem(8, chunk=8, batch=2, kv_heads=2, head_dim=32, causal=causal, dtype=torch.float32)
    found = errors(problem, [results[0] for results in pools(8).run(run_problems, [problem], [plan])])
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("plan", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("measure", [rms_errors, errors])
def test_bf16_errs_at_most_twice_as_much_as_one_process(
    pools: Callable[[int], Pool], plan: Plan, causal: bool, measure: Callable[..., dict[str, float]]
) -> None:
    problem = Problem(8, chunk=32, kv_heads=2, head_dim=64, causal=causal, dtype=torch.bfloat16)
    found = measure(problem, [results[0] for results in pools(8).run(run_problems, [problem], [plan])])
    alone = measure(problem, single_process(problem))
    assert all(found[name] <= 2 * alone[name] for name in alone), (found, alone)
