"""Process groups of a grid: inside any group of a larger job, from a mesh, or with no torch.distributed at all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from megatron_wallfacer.attention import attention, forget_groups
from megatron_wallfacer.engine import connections
from megatron_wallfacer.engine.groups import KINDS, Channel, _free_bytes, backend_of, connect, is_alive
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import AXES, Grid
from megatron_wallfacer.schedule.plan import Plan
from tests.engine.passes import Case, errors, run_case
from tests.support.dense import Problem
from tests.support.pool import Pool

ADJACENT = ((0, 1, 2, 3), (4, 5, 6, 7))
STRIDED = ((0, 2, 4, 6), (1, 3, 5, 7))
TEAM_RING, RING = Plan(Grid(team=2, ring_outer=2)), Plan(Grid(ring_outer=4))
PUBLISHED = Plan(Grid(team=2, kv_team=2), kv_order="paper", backward="pass-q")
USP = Plan(Grid(head=2, ring_outer=2), forward="pass-q")


def run_in_groups(rank: int, members: tuple[tuple[int, ...], ...], work: list[Case]) -> object:
    """On a worker: each group of ranks does its own problem under its own plan, at the same time."""
    groups = [dist.new_group(ranks) for ranks in members]
    mine = next(index for index, ranks in enumerate(members) if rank in ranks)
    results = run_case(members[mine].index(rank), work[mine], groups[mine])
    forget_groups()
    return results


def run_on_mesh(rank: int, shape: tuple[int, int], names: tuple[str, str], problem: Problem, plan: Plan) -> object:
    """On a worker: the same problem along the ``cp`` dimension of a mesh, once for each of its rows."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)["cp"]
    results = run_case(mesh.get_local_rank(), Case(plan, problem), mesh)
    forget_groups()
    return results


def run_one_after_the_other(rank: int, problem: Problem, plans: list[Plan]) -> list[object]:
    """On a worker: several grids over the same group, whose groups are kept until the end."""
    results = [run_case(rank, Case(plan, problem)) for plan in [*plans, *plans]]
    forget_groups()
    return results


def channel_ranks(rank: int, grid: Grid) -> tuple[dict[Channel, list[int]], int]:
    """On a worker: the ranks of each channel's group, and how many groups there are besides the whole."""
    found = connect(None, grid)
    ranks = {channel: dist.get_process_group_ranks(group) for channel, group in found.groups.items()}
    made = len(set(found.groups.values()) - {dist.group.WORLD})
    found.close()
    return ranks, made


def error_of(rank: int, grid: Grid) -> str:
    try:
        connect(None, grid)
    except OptionError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("members", [ADJACENT, STRIDED], ids=["adjacent", "strided"])
@pytest.mark.parametrize(
    "plans",
    [(TEAM_RING, TEAM_RING), (TEAM_RING, RING), (PUBLISHED, TEAM_RING), (USP, RING)],
    ids=["same", "other", "published", "heads"],
)
def test_two_groups_in_one_job(
    pools: Callable[[int], Pool], members: tuple[tuple[int, ...], ...], plans: tuple[Plan, Plan]
) -> None:
    work = [Case(plan, Problem(4, kv_heads=2, seed=seed)) for seed, plan in enumerate(plans)]
    ranks = pools(8).run(run_in_groups, members, work)
    for group, case in zip(members, work, strict=True):
        assert max(errors(case.problem, [ranks[rank] for rank in group]).values()) <= 1e-12


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
    problem, plans = Problem(4, kv_heads=2), [TEAM_RING, RING, PUBLISHED, USP]
    ranks = pools(4).run(run_one_after_the_other, problem, plans)
    for index in range(2 * len(plans)):
        assert max(errors(problem, [results[index] for results in ranks]).values()) <= 1e-12


def test_one_rank_without_torch_distributed() -> None:
    assert not dist.is_initialized()
    problem = Problem(1, kv_heads=2)
    assert max(errors(problem, [run_case(0, Case(Plan(Grid()), problem))]).values()) <= 1e-12


def test_groups_are_the_neighbours_of_the_grid(pools: Callable[[int], Pool]) -> None:
    grid = Grid(head=2, kv_team=2, ring_inner=2, placement=("ring_inner", "kv_team", "head"))
    wide = ("head", "kv_team", "ring_inner")
    for rank, (groups, made) in enumerate(pools(8).run(channel_ranks, grid)):
        neighbours = {(axis, kind): list(grid.neighbours(rank, axis)) for axis in wide for kind in KINDS}
        assert groups == neighbours | {("cp", kind): list(range(8)) for kind in KINDS}
        assert made == 7  # with one of all ranks, beside the world


@pytest.mark.parametrize("axis", AXES)
def test_axis_of_all_ranks_has_the_whole_group_for_its_inputs(pools: Callable[[int], Pool], axis: str) -> None:
    for groups, made in pools(4).run(channel_ranks, Grid(**{axis: 4})):
        assert groups == {(name, kind): [0, 1, 2, 3] for name in ("cp", axis) for kind in KINDS}
        assert made == 2  # on gloo the whole group is not the caller's


def test_axis_of_one_rank_has_no_group(pools: Callable[[int], Pool]) -> None:
    for groups, _ in pools(4).run(channel_ranks, Grid(team=2, ring_outer=2)):
        assert {axis for axis, _ in groups} == {"cp", "team", "ring_outer"}


def test_every_transfer_of_every_scheme_has_a_group(pools: Callable[[int], Pool]) -> None:
    for plan in (TEAM_RING, RING, PUBLISHED, USP, Plan(Grid(ring_outer=2, ring_inner=2), backward="pass-q")):
        ranks = pools(4).run(channel_ranks, plan.grid)
        for rank, (groups, _) in enumerate(ranks):
            for schedule in Case(plan, Problem(4)).schedules(rank):
                for transfer in schedule.transfers:
                    peers = {message.peer for message in (*transfer.sends, *transfer.receives)}
                    assert peers | {rank} <= set(groups[transfer.channel])


def test_closing_leaves_the_group_that_was_given(pools: Callable[[int], Pool]) -> None:
    pools(4).run(channel_ranks, Grid(team=4))
    assert pools(4).run(sum_of_ranks) == [6.0] * 4


def sum_of_ranks(rank: int) -> float:
    """On a worker: a sum over the world."""
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return total.item()


def test_grid_of_another_size_is_rejected(pools: Callable[[int], Pool]) -> None:
    message = "grid=team 2 x ring_outer 4: must be axes whose product is the group's size 4"
    assert pools(4).run(error_of, Grid(team=2, ring_outer=4)) == [message] * 4


def test_grid_of_many_is_rejected_without_torch_distributed() -> None:
    with pytest.raises(OptionError, match="group's size 1"):
        attention(*[torch.zeros(1, 2, 1, 8)] * 3, plan=Grid(ring_outer=2))


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
    grid = Grid(team=2, kv_team=2, ring_outer=2)
    for rank, summed in enumerate(pools(8).run(run_recorded, grid)):
        mine = [list(grid.neighbours(rank, axis)) for axis in ("team", "kv_team", "ring_outer") for _ in KINDS]
        assert sorted(summed) == sorted([list(range(8)), *mine])


# --- destruction ---


def destroyed_in_order(rank: int, grid: Grid) -> list[str]:
    """On a worker: descriptions of the groups that closing destroys, in order."""
    order, destroy = [], dist.destroy_process_group

    def recorded(group: dist.ProcessGroup) -> None:
        order.append((int(group.group_name), group.group_desc))
        destroy(group)

    made = connect(None, grid)
    dist.destroy_process_group = recorded
    try:
        made.close()
        made.close()  # a second time there is nothing left
    finally:
        dist.destroy_process_group = destroy
    # Names are numbers that torch.distributed counts up on all ranks alike.
    assert order == sorted(order)
    return [name for _, name in order]


def test_groups_are_destroyed_in_the_order_of_creation_on_all_ranks(pools: Callable[[int], Pool]) -> None:
    """NCCL's teardown waits for all members; axes overlap, so two orders can wait for each other for ever."""
    wanted = ["WALLFACER_CP_INPUTS"]
    wanted += [
        f"WALLFACER_{axis}_{kind}" for axis in ("TEAM", "KV_TEAM", "RING_OUTER") for kind in ("INPUTS", "RESULTS")
    ]
    ranks = pools(8).run(destroyed_in_order, Grid(team=2, kv_team=2, ring_outer=2))
    assert [sorted(order) for order in ranks] == [sorted(wanted)] * 8
    assert ranks == [ranks[0]] * 8


def run_after_the_first_group_died(rank: int, problem: Problem) -> tuple[object, list[int], str]:
    """On a worker: attention over the second of two groups of the same ranks; entries in the cache; an error."""
    # An axis of all ranks uses the context-parallel group itself.
    case, counts = Case(Plan(Grid(team=4)), problem), []
    first, second = dist.new_group(range(4)), dist.new_group(range(4))
    for group in (first, second):
        run_case(rank, case, group)
        counts.append(len(connections._made))
    made = [group for transfers in connections._made.values() for group in transfers.groups.groups.values()]
    dist.destroy_process_group(first)
    results = run_case(rank, case, second)
    third = dist.new_group(range(4))
    run_case(rank, case, third)
    counts.append(len(connections._made))
    counts.append(sum(map(is_alive, dict.fromkeys(made))))
    try:
        run_case(rank, case, first)
        error_text = "accepted"
    except OptionError as error:
        error_text = str(error)
    forget_groups()
    return results, counts, error_text


def test_a_destroyed_group_is_never_used_again(pools: Callable[[int], Pool]) -> None:
    problem = Problem(4, kv_heads=2)
    ranks = pools(4).run(run_after_the_first_group_died, problem)
    assert max(errors(problem, [results for results, _, _ in ranks]).values()) <= 1e-12
    for _, counts, error_text in ranks:
        # Two entries; still two when the third group has taken the first one's place; of the four groups that the
        # first two entries had, those of the second are left.
        assert counts == [1, 2, 2, 2]
        assert error_text == "group=a destroyed one: must be a process group that torch.distributed still has"


# --- backend and device ---


@pytest.mark.parametrize(
    ("config", "cpu", "cuda"),
    [
        ("cpu:gloo,cuda:gloo", "gloo", "gloo"),
        ("cuda:nccl", None, "nccl"),
        ("cpu:gloo,cuda:nccl", "gloo", "nccl"),
        ("cpu:gloo", "gloo", None),
    ],
)
def test_backend_of_a_device(monkeypatch: pytest.MonkeyPatch, config: str, cpu: str | None, cuda: str | None) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    assert backend_of(None, torch.device("cpu")) == cpu
    assert backend_of(None, torch.device("cuda", 1)) == cuda


def backends_of_the_world(rank: int) -> list[str | None]:
    """On a worker."""
    return [backend_of(None, torch.device(name)) for name in ("cpu", "cuda")]


def test_backend_of_a_real_group(pools: Callable[[int], Pool]) -> None:
    assert pools(4).run(backends_of_the_world) == [["gloo", "gloo"]] * 4


def made_with(rank: int, config: str, grid: Grid) -> tuple[set[str], list[tuple], str | None, int]:
    """On a worker: devices of the warm-up, arguments of new groups and the backend, where torch says ``config``."""
    devices, arguments = set(), []
    patched = {
        "all_reduce": lambda tensor, *, group: devices.add(tensor.device.type),
        "get_backend_config": lambda group: config,
        "get_backend": lambda group: "gloo",
        "new_group": lambda ranks, **options: arguments.append(options),
    }
    originals = {name: getattr(dist, name) for name in patched}
    for name, value in patched.items():
        setattr(dist, name, value)
    try:
        made = connect(
            None, grid, device=torch.device("meta"), timeout=timedelta(seconds=7), options=lambda: {"max_ctas": 4}
        )
    finally:
        for name, value in originals.items():
            setattr(dist, name, value)
    apart = len({id(options["pg_options"]) for options in arguments})
    return devices, [tuple(options.values()) for options in arguments], made.backend, apart


# "meta" is the stand-in for a GPU.
@pytest.mark.parametrize("config", ["meta:nccl", "cpu:gloo,meta:nccl"])
def test_groups_of_nccl_are_warmed_up_on_the_messages_device_and_get_options(
    pools: Callable[[int], Pool], config: str
) -> None:
    """Whatever get_backend returns: "undefined" after a plain init_process_group()."""
    for devices, arguments, backend, apart in pools(2).run(made_with, config, Grid(team=2)):
        assert devices == {"meta"}
        assert backend == "nccl"
        assert arguments == [(timedelta(seconds=7), "gloo", {"max_ctas": 4}, "WALLFACER_TEAM_RESULTS")]
        assert apart == 1


def test_options_of_nccl_are_not_for_gloo(pools: Callable[[int], Pool]) -> None:
    for _, arguments, backend, _ in pools(2).run(made_with, "cpu:gloo,meta:gloo", Grid(team=2)):
        assert backend == "gloo"
        assert [options for _, _, options, _ in arguments] == [None, None]


@pytest.mark.parametrize(("kind", "device"), [("direct", "cuda"), ("staged", "cpu")])
def test_groups_are_made_for_the_device_of_the_messages(
    monkeypatch: pytest.MonkeyPatch, kind: str, device: str
) -> None:
    asked = []

    def recorded(group: object, grid: Grid, **options: object) -> SimpleNamespace:
        asked.append(options["device"].type)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(connections, "connect", recorded)
    monkeypatch.setattr(connections, "check_rows", lambda device: None)
    monkeypatch.setattr(connections, "_made", {})
    for _ in range(2):
        connections.connected(None, Grid(), kind, torch.device("cuda"))
    assert asked == [device]


def test_memory_that_groups_hold_is_what_became_used_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([900, 700])
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 1000))
    assert _free_bytes(torch.device("cuda")) - _free_bytes(torch.device("cuda")) == 200
    assert _free_bytes(torch.device("cpu")) == 0
