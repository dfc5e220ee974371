"""What moves, what is counted, and what really crosses the wire."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from megatron_wallfacer.engine.autograd import Call, attend
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.runtime import Runtime
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.kernels import select_kernel
from megatron_wallfacer.schedule.grid import RINGS_ADJACENT, Grid
from megatron_wallfacer.schedule.moves import Combine, Gather, Hop, Reduce
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape, received_bytes
from tests.engine import traffic, wire
from tests.support.dense import Problem
from tests.support.pool import Pool

PLANS = traffic.PLANS | {
    "one team": Plan(Grid(team=8)),
    "rings adjacent": Plan(Grid(2, 2, 2, RINGS_ADJACENT)),
    "wallfacer without teams": make_plan("wallfacer", 8, team_size=1),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


# --- moves, on a team of four: rank r holds chunks r and 7 - r, and each chunk is one row ---


def run_moves(rank: int) -> dict[str, list[float]]:
    """On a worker: what arrives in each kind of move, as a list of rows."""
    transfers = Transfers(connect(None, Grid(team=4)))
    team = tuple(range(4))
    shard = torch.tensor([[float(rank)], [7.0 - rank]])
    block = torch.arange(8.0).unsqueeze(1)
    moved = {
        "gather": transfers.gather(Gather("team", ("q",), team), (shard,)),
        "reduce": transfers.reduce(Reduce("team", ("dq",), team), (block + 10 * rank,)),
        "exchange": transfers.exchange(Combine("team", team, ("out",)), (block + 10 * rank,)),
        "hop": transfers.hop(Hop("cp", ("k",), (rank + 1) % 4, (rank - 1) % 4, shards=1), (shard,)),
    }
    return {kind: pending.wait()[0].flatten().tolist() for kind, pending in moved.items()}


@pytest.fixture(scope="module")
def moved(pools: Callable[[int], Pool]) -> list[dict[str, list[float]]]:
    return pools(4).run(run_moves)


def test_gather_brings_a_block_sorted_by_position(moved: list[dict[str, list[float]]]) -> None:
    assert [ranks["gather"] for ranks in moved] == [[0, 1, 2, 3, 4, 5, 6, 7]] * 4


def test_reduce_brings_each_rank_the_sum_of_its_own_chunks(moved: list[dict[str, list[float]]]) -> None:
    assert [ranks["reduce"] for ranks in moved] == [[4 * r + 60, 4 * (7 - r) + 60] for r in range(4)]


def test_exchange_brings_each_rank_everyones_part_of_its_own_chunks(moved: list[dict[str, list[float]]]) -> None:
    expected = [[chunk + 10 * member for member in range(4) for chunk in (r, 7 - r)] for r in range(4)]
    assert [ranks["exchange"] for ranks in moved] == expected


def test_hop_brings_the_block_of_the_rank_before(moved: list[dict[str, list[float]]]) -> None:
    assert [ranks["hop"] for ranks in moved] == [[3, 4], [0, 7], [1, 6], [2, 5]]


# --- what is counted ---


def run_counted(rank: int, problem: Problem, plan: Plan, causal: bool) -> tuple[Counter, Counter]:
    """On a worker: bytes counted in a forward and in a backward, by (axis, tensor)."""
    kernel = select_kernel("torch", device=torch.device("cpu"), dtype=problem.dtype, head_dim=problem.head_dim)
    groups = connect(None, plan.grid)
    transfers = Transfers(groups)
    q, k, v, dout = (problem.shard(x, rank).transpose(0, 1).contiguous() for x in problem.tensors())
    out = attend(*(x.requires_grad_() for x in (q, k, v)), Call(plan, Runtime(transfers, kernel, 0.3), causal=causal))
    forward = transfers.received.copy()
    out.backward(dout)
    groups.close()
    return forward, transfers.received - forward


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_counted_are_those_of_the_schedule(pools: Callable[[int], Pool], plan: Plan, dtype: torch.dtype) -> None:
    problem = Problem(8, batch=2, kv_heads=2, dtype=dtype)
    shape = Shape(
        2 * problem.chunk,
        problem.q_heads,
        problem.kv_heads,
        problem.head_dim,
        batch=problem.batch,
        itemsize=dtype.itemsize,
        accumulate_itemsize=max(4, dtype.itemsize),
    )
    for rank, (forward, backward) in enumerate(pools(8).run(run_counted, problem, plan, True)):
        assert forward == received_bytes(forward_schedule(plan, rank), shape)
        assert backward == received_bytes(backward_schedule(plan, rank), shape)


# --- what crosses the wire, on the loopback device of a network namespace of its own ---

HEADERS = 0.02  # share of the bytes on the device that may be headers and acknowledgements


@pytest.fixture(scope="module")
def measured() -> wire.Measured:
    found = wire.measure()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def counted(case: dict) -> int:
    return sum(case["counted"].values())


@pytest.mark.parametrize("kind", ["gather", "exchange", "reduce", "hop"])
def test_move_carries_what_is_counted(measured: wire.Measured, kind: str) -> None:
    case = measured[kind]
    assert counted(case) <= case["carried"] <= counted(case) * (1 + HEADERS)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("scheme", traffic.PLANS)
def test_a_pass_carries_what_is_counted(measured: wire.Measured, scheme: str, direction: str) -> None:
    case = measured[f"{scheme} {direction}"]
    assert counted(case) <= case["carried"] <= counted(case) * (1 + HEADERS)


def test_counted_bytes_of_a_move_are_those_of_all_ranks(measured: wire.Measured) -> None:
    shard = traffic.SHARD.numel() * traffic.SHARD.element_size()
    assert {kind: counted(measured[kind]) for kind in ("gather", "exchange", "reduce", "hop")} == {
        "gather": 8 * 7 * shard,
        "exchange": 8 * 7 * shard,
        "reduce": 8 * 7 * shard,
        "hop": 8 * shard,
    }
