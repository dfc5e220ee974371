"""What moves, what is counted, and what really crosses the wire."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.blocks import Block, Sizes
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.schedule.grid import RINGS_ADJACENT, Grid
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.ops import DOUT, PARTIAL_OUT, Message
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.volume import received_bytes
from tests.engine import traffic, wire
from tests.engine.passes import Case, call_of, leaves
from tests.support.dense import Problem
from tests.support.pool import Pool

PLANS = traffic.PLANS | {
    "one team": Plan(Grid(team=8)),
    "heads only": Plan(Grid(head=8)),
    "rings adjacent": Plan(Grid(team=2, kv_team=2, ring_outer=2, placement=RINGS_ADJACENT)),
    "team-ring, two head groups": Plan(Grid(team=2, ring_outer=4), backward="q", head_groups=2),
    "wallfacer without teams": Plan(Grid(ring_outer=8), kv_order="paper", backward="q"),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


# --- single moves between four ranks, a chunk is one row ---

ROW = Sizes(1, 1, 1, 1, 1, 1, 1, torch.float32, torch.device("cpu"))


def rows(blocks: dict[str, Block]) -> dict[str, dict[str, list[float]]]:
    """Rows by value and tensor."""
    return {
        name: {tensor: block.tensors[tensor].flatten().tolist() for tensor in block.tensors}
        for name, block in blocks.items()
    }


def run_moves(rank: int, early: bool) -> dict[str, dict]:
    """On a worker: what arrives in each kind of move."""
    transfers = Transfers(connect(None, Grid(ring_outer=4)))
    made = {
        "hop": traffic.hop(rank, 4, ROW),
        "hop back": traffic.hop(rank, 4, ROW, way=-1, payload=DOUT),
        "gather": traffic.gather(rank, 4, ROW),
        "scatter": traffic.scatter(rank, 4, ROW, PARTIAL_OUT),
    }
    moved = {kind: rows(traffic.start(transfers, one, ROW, early=early).wait()) for kind, one in made.items()}
    transfers.groups.close()
    return moved


@pytest.fixture(scope="module", params=[False, True], ids=["at once", "expected early"])
def moved(request: pytest.FixtureRequest, pools: Callable[[int], Pool]) -> list[dict[str, dict]]:
    return pools(4).run(run_moves, request.param)


def from_rank(rank: int, of: int | None = None) -> list[float]:
    """Rows of a rank's shard, or of another's shard, as that rank has them."""
    return [100 * rank + chunk for chunk in shard_chunks(rank if of is None else of, 4)]


def test_hop_brings_all_tensors_of_the_rank_before(moved: list[dict[str, dict]]) -> None:
    for rank, arrived in enumerate(moved):
        before, after = (rank - 1) % 4, (rank + 1) % 4
        assert arrived["hop"] == {f"from{before}": dict.fromkeys(("k", "v"), from_rank(before))}
        assert arrived["hop back"] == {f"from{after}": dict.fromkeys(DOUT, from_rank(after))}


def test_gather_brings_everyones_rows(moved: list[dict[str, dict]]) -> None:
    for rank, arrived in enumerate(moved):
        assert arrived["gather"] == {f"from{r}": {"q": from_rank(r)} for r in range(4) if r != rank}


def test_scatter_brings_everyones_sum_of_ones_own_rows(moved: list[dict[str, dict]]) -> None:
    for rank, arrived in enumerate(moved):
        want = {f"from{r}": dict.fromkeys(PARTIAL_OUT, from_rank(r, rank)) for r in range(4) if r != rank}
        assert arrived["scatter"] == want


def run_out_of_order(rank: int) -> list[dict]:
    """On a worker: three moves between the same ranks at once; half of the ranks expect them in another order."""
    transfers = Transfers(connect(None, Grid(ring_outer=4)))
    made = [traffic.hop(rank, 4, ROW, tag=tag) for tag in range(3)]
    for tag, one in enumerate(made):
        for tensor in one.blocks["mine"].tensors.values():
            tensor.add_(1000 * tag)
    order = (2, 0, 1) if rank % 2 else (0, 1, 2)
    expected = {index: transfers.expect(made[index].move, made[index].values, ROW) for index in order}
    pending = {
        index: transfers.start(made[index].move, made[index].blocks, made[index].values, ROW, expected[index])
        for index in (order if rank % 2 == 0 else order[::-1])
    }
    found = [rows(pending[index].wait()) for index in range(3)]
    transfers.groups.close()
    return found


def test_a_message_finds_its_receive_by_its_tag(pools: Callable[[int], Pool]) -> None:
    for rank, found in enumerate(pools(4).run(run_out_of_order)):
        before = (rank - 1) % 4
        for tag, arrived in enumerate(found):
            want = [1000 * tag + row for row in from_rank(before)]
            assert arrived == {f"from{before}": {"k": want, "v": want}}


def run_packets(rank: int) -> dict[str, bool]:
    """On a worker: which bytes are copied to be sent. No message leaves."""
    transfers = Transfers(connect(None, Grid()))
    made = traffic.scatter(0, 4, ROW, PARTIAL_OUT)
    block, values = made.blocks["sum"], made.values

    def packet(of: Block, chunks: tuple[int, ...]) -> torch.Tensor:
        return transfers._packet(of, Message(1, "sum", chunks, 0), made.move, values, ROW)

    view = Block({name: tensor[:] for name, tensor in block.tensors.items()}, block.chunks)
    first, second = packet(view, view.chunks), packet(view, view.chunks)
    part = packet(block, (1, 6))
    return {
        "whole block": packet(block, block.chunks) is block.packet,
        "first of a view": torch.equal(first, block.packet) and first.data_ptr() != block.packet.data_ptr(),
        "second of a view": second is first,
        "some rows": part.numel() * 4 == block.packet.numel() and part.data_ptr() != block.packet.data_ptr(),
    }


def test_only_views_and_some_rows_are_copied_to_be_sent_and_views_once() -> None:
    assert run_packets(0) == dict.fromkeys(("whole block", "first of a view", "second of a view", "some rows"), True)


def run_waited(rank: int) -> tuple[bool, dict, dict]:
    """On a worker: a move that has been waited for holds nothing any more."""
    transfers = Transfers(connect(None, Grid(ring_outer=2)))
    pending = traffic.start(transfers, traffic.hop(rank, 2, ROW), ROW)
    pending.wait()
    transfers.groups.close()
    return vars(pending) == {"_works": (), "_sent": (), "_arriving": {}}, pending.wait(), dict(transfers.received)


def test_a_move_that_is_over_holds_no_buffer(pools: Callable[[int], Pool]) -> None:
    size = 2 * 4
    counts = {("ring_outer", "k"): size, ("ring_outer", "v"): size}
    assert pools(2).run(run_waited) == [(True, {}, counts)] * 2


# --- what is counted ---


def run_counted(rank: int, cases: list[Case]) -> list[tuple[Counter, Counter]]:
    """On a worker: bytes counted in a forward and in a backward, by (axis, tensor)."""
    found = []
    for case in cases:
        transfers = Transfers(connect(None, case.plan.grid))
        q, k, v, dout = leaves(rank, case.problem)
        out = attend(q, k, v, call_of(case, transfers))
        forward = transfers.received.copy()
        out.backward(dout)
        transfers.groups.close()
        found.append((forward, transfers.received - forward))
    return found


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def counts(request: pytest.FixtureRequest, pools: Callable[[int], Pool]) -> dict[str, tuple[Case, list]]:
    """Cases, and what each rank counted."""
    problem = Problem(8, batch=2, q_heads=8, kv_heads=4, dtype=request.param)
    cases = {name: Case(plan, problem) for name, plan in PLANS.items()}
    ranks = pools(8).run(run_counted, list(cases.values()))
    return {name: (case, [results[index] for results in ranks]) for index, (name, case) in enumerate(cases.items())}


@pytest.mark.parametrize("name", PLANS)
def test_bytes_counted_are_those_of_the_schedule(counts: dict[str, tuple[Case, list]], name: str) -> None:
    case, ranks = counts[name]
    for rank, passes in enumerate(ranks):
        for found, schedule in zip(passes, case.schedules(rank), strict=True):
            assert found == received_bytes(schedule, case.shape)


def test_bytes_fall_with_a_window_as_the_schedule_says(pools: Callable[[int], Pool]) -> None:
    problem = Problem(8, chunk=8, q_heads=8, kv_heads=4, window=(9, 0), documents=(0, 30, 100, 128))
    cases = [Case(plan, problem) for plan in PLANS.values()]
    whole = [Case(plan, replace(problem, window=(-1, -1), documents=None)) for plan in PLANS.values()]
    for rank, results in enumerate(pools(8).run(run_counted, cases)):
        for case, everything, passes in zip(cases, whole, results, strict=True):
            for found, schedule, dense in zip(passes, case.schedules(rank), everything.schedules(rank), strict=True):
                assert found == received_bytes(schedule, case.shape)
                if case.plan.kv_order == "native" and case.plan.grid.head == 1:
                    assert sum(found.values()) < 0.7 * sum(received_bytes(dense, case.shape).values())


def test_kv_heads_that_parts_share_are_counted_in_each(pools: Callable[[int], Pool]) -> None:
    case = Case(Plan(Grid(head=4, ring_outer=2)), Problem(8, q_heads=8, kv_heads=2, dtype=torch.bfloat16))
    for rank, ((forward, backward),) in enumerate(pools(8).run(run_counted, [case])):
        schedules = case.schedules(rank)
        assert (forward, backward) == tuple(received_bytes(schedule, case.shape) for schedule in schedules)


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


@pytest.mark.parametrize("kind", traffic.MOVES)
def test_move_carries_what_is_counted(measured: wire.Measured, kind: str) -> None:
    case = measured[kind]
    assert counted(case) <= case["carried"] <= counted(case) * (1 + HEADERS)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("scheme", traffic.PLANS)
def test_a_pass_carries_what_is_counted(measured: wire.Measured, scheme: str, direction: str) -> None:
    case = measured[f"{scheme} {direction}"]
    assert counted(case) <= case["carried"] <= counted(case) * (1 + HEADERS)


def test_counted_bytes_of_a_move_are_those_of_all_ranks(measured: wire.Measured) -> None:
    shard = traffic.SHARD_BYTES
    assert {kind: counted(measured[kind]) for kind in traffic.MOVES} == {
        "hop": 8 * 2 * shard,
        "gather": 8 * 7 * shard,
        "scatter": 8 * 7 * shard,
    }
