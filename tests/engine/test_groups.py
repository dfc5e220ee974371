"""Process groups of a grid: inside any group of a larger job, from a mesh, or with no torch.distributed at all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from megatron_wallfacer.attention import attention, forget_groups
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import AXES, Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schemes import make_plan
from tests.engine.test_exactness import errors
from tests.support.dense import Problem
from tests.support.pool import Pool

ADJACENT = ((0, 1, 2, 3), (4, 5, 6, 7))
STRIDED = ((0, 2, 4, 6), (1, 3, 5, 7))
TEAM_RING, RING, PUBLISHED = Plan(Grid(team=2, ring=2)), Plan(Grid(ring=4)), make_plan("wallfacer", 4, team_size=2)


def attend(rank: int, problem: Problem, plan: Plan, group: object) -> list[np.ndarray]:
    """This rank's out, dq, dk, dv."""
    q, k, v, dout = (problem.shard(x, rank) for x in problem.tensors())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, plan=plan, group=group)
    out.backward(dout)
    return [x.detach().numpy() for x in (out, q.grad, k.grad, v.grad)]


def run_in_groups(rank: int, members: tuple[tuple[int, ...], ...], work: list[tuple[Problem, Plan]]) -> object:
    """On a worker: each group of ranks does its own problem under its own plan, at the same time."""
    groups = [dist.new_group(ranks) for ranks in members]
    mine = next(index for index, ranks in enumerate(members) if rank in ranks)
    results = attend(members[mine].index(rank), *work[mine], groups[mine])
    forget_groups()
    return results


def run_on_mesh(rank: int, shape: tuple[int, int], names: tuple[str, str], problem: Problem, plan: Plan) -> object:
    """On a worker: the same problem along the ``cp`` dimension of a mesh, once for each of its rows."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)["cp"]
    results = attend(mesh.get_local_rank(), problem, plan, mesh)
    forget_groups()
    return results


def run_one_after_the_other(rank: int, problem: Problem, plans: list[Plan]) -> list[object]:
    """On a worker: several grids over the same group, whose groups are kept until the end."""
    results = [attend(rank, problem, plan, None) for plan in [*plans, *plans]]
    forget_groups()
    return results


def axis_ranks(rank: int, grid: Grid) -> dict[str, list[int]]:
    """On a worker: the ranks of each group."""
    groups = connect(None, grid)
    found = {axis: dist.get_process_group_ranks(group) for axis, group in groups.groups.items()}
    groups.close()
    return found


def refusal_of(rank: int, grid: Grid) -> str:
    try:
        connect(None, grid)
    except OptionError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("members", [ADJACENT, STRIDED], ids=["adjacent", "strided"])
@pytest.mark.parametrize(
    "plans", [(TEAM_RING, TEAM_RING), (TEAM_RING, RING), (PUBLISHED, TEAM_RING)], ids=["same", "other", "published"]
)
def test_two_groups_in_one_job(
    pools: Callable[[int], Pool], members: tuple[tuple[int, ...], ...], plans: tuple[Plan, Plan]
) -> None:
    work = [(Problem(4, kv_heads=2, seed=seed), plan) for seed, plan in enumerate(plans)]
    ranks = pools(8).run(run_in_groups, members, work)
    for group, (problem, _) in zip(members, work, strict=True):
        assert max(errors(problem, [ranks[rank] for rank in group]).values()) <= 1e-12


@pytest.mark.parametrize(
    ("shape", "names", "members"),
    [((2, 4), ("dp", "cp"), ADJACENT), ((4, 2), ("cp", "dp"), STRIDED)],
    ids=["adjacent", "strided"],
)
def test_device_mesh_for_a_group(
    pools: Callable[[int], Pool], shape: tuple[int, int], names: tuple[str, str], members: tuple[tuple[int, ...], ...]
) -> None:
    problem = Problem(4, kv_heads=2)
    ranks = pools(8).run(run_on_mesh, shape, names, problem, TEAM_RING)
    for group in members:
        assert max(errors(problem, [ranks[rank] for rank in group]).values()) <= 1e-12


def test_several_grids_over_one_group(pools: Callable[[int], Pool]) -> None:
    problem, plans = Problem(4, kv_heads=2), [TEAM_RING, RING, PUBLISHED]
    ranks = pools(4).run(run_one_after_the_other, problem, plans)
    for index in range(2 * len(plans)):
        assert max(errors(problem, [results[index] for results in ranks]).values()) <= 1e-12


def test_one_rank_without_torch_distributed() -> None:
    assert not dist.is_initialized()
    problem = Problem(1, kv_heads=2)
    assert max(errors(problem, [attend(0, problem, Plan(Grid()), None)]).values()) <= 1e-12


def test_groups_are_the_neighbours_of_the_grid(pools: Callable[[int], Pool]) -> None:
    grid = Grid(2, 2, 2, ("ring", "team", "kv_team"))
    for rank, groups in enumerate(pools(8).run(axis_ranks, grid)):
        neighbours = {axis: list(grid.neighbours(rank, axis)) for axis in AXES}
        assert groups == neighbours | {"cp": list(range(8))}


def test_axis_of_one_rank_has_no_group(pools: Callable[[int], Pool]) -> None:
    assert all(groups.keys() == {"cp", "ring"} for groups in pools(4).run(axis_ranks, Grid(ring=4)))


def test_grid_of_another_size_is_refused(pools: Callable[[int], Pool]) -> None:
    message = "grid=team 2 x kv_team 1 x ring 4: must be axes whose product is the group's size 4"
    assert pools(4).run(refusal_of, Grid(team=2, ring=4)) == [message] * 4


def test_grid_of_many_is_refused_without_torch_distributed() -> None:
    with pytest.raises(OptionError, match="group's size 1"):
        attention(*[torch.zeros(1, 2, 1, 8)] * 3, plan=Grid(ring=2))


def run_recorded(rank: int, grid: Grid) -> list[list[int]]:
    """On a worker: the groups over which connecting sums something, as ranks."""
    summed, all_reduce = [], dist.all_reduce

    def recorded(tensor: torch.Tensor, *, group: dist.ProcessGroup) -> None:
        summed.append(dist.get_process_group_ranks(group))
        all_reduce(tensor, group=group)

    dist.all_reduce = recorded
    try:
        connect(None, grid).close()
    finally:
        dist.all_reduce = all_reduce
    return summed


def test_every_group_is_used_by_all_its_members_before_any_hop(pools: Callable[[int], Pool]) -> None:
    """NCCL makes a communicator with the first operation, and the permutation's hops do not concern every rank."""
    for rank, summed in enumerate(pools(8).run(run_recorded, Grid(2, 2, 2))):
        mine = [list(Grid(2, 2, 2).neighbours(rank, axis)) for axis in ("team", "kv_team", "ring")]
        assert sorted(summed) == sorted([list(range(8)), *mine])
