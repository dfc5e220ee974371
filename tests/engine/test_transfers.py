"""What transfers, what is counted, and what really crosses the wire."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.transfers import Transfers, _in_halves
from megatron_wallfacer.engine.waits.progress import PROGRESS, Label
from megatron_wallfacer.schedule.grid import RINGS_ADJACENT, Grid
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.lower import lower
from megatron_wallfacer.schedule.mask import CAUSAL
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.program import Copy, MessageBuffer
from megatron_wallfacer.schedule.rows import contiguous
from megatron_wallfacer.schedule.volume import received_bytes
from tests.engine import traffic, wire
from tests.engine.passes import Case, call_of, leaves
from tests.support.dense import Problem
from tests.support.pool import Pool

PLANS = traffic.PLANS | {
    "one team": Plan(Grid(team=8)),
    "heads only": Plan(Grid(head=8)),
    "rings adjacent": Plan(Grid(team=2, kv_team=2, ring_outer=2, placement=RINGS_ADJACENT)),
    "team-ring, two head groups": Plan(Grid(team=2, ring_outer=4), backward="pass-q", head_groups=2),
    "wallfacer without teams": Plan(Grid(ring_outer=8), kv_order="paper", backward="pass-q"),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


# --- single transfers between four ranks, a chunk is one row ---


def run_transfers(rank: int, early: bool) -> dict[str, dict]:
    """On a worker: what arrives in each kind of transfer."""
    transfers = Transfers(connect(None, Grid(ring_outer=4)))
    made = {
        "hop": traffic.hop(rank, 4, 1),
        "hop back": traffic.hop(rank, 4, 1, way=-1),
        "gather": traffic.gather(rank, 4, 1),
        "scatter": traffic.scatter(rank, 4, 1),
    }
    moved = {kind: traffic.Flight(transfers, one, early=early).start().wait() for kind, one in made.items()}
    transfers.groups.close()
    return moved


@pytest.fixture(scope="module", params=[False, True], ids=["at once", "posted early"])
def moved(request: pytest.FixtureRequest, pools: Callable[[int], Pool]) -> list[dict[str, dict]]:
    return pools(4).run(run_transfers, request.param)


def from_rank(rank: int, of: int | None = None) -> list[float]:
    """Rows of a rank's shard, or of another's shard, as that rank has them."""
    return [100 * rank + chunk for chunk in shard_chunks(rank if of is None else of, 4)]


def test_hop_brings_the_rows_of_the_rank_before(moved: list[dict[str, dict]]) -> None:
    for rank, arrived in enumerate(moved):
        before, after = (rank - 1) % 4, (rank + 1) % 4
        assert arrived["hop"] == {f"from{before}": from_rank(before)}
        assert arrived["hop back"] == {f"from{after}": from_rank(after)}


def test_gather_brings_everyones_rows(moved: list[dict[str, dict]]) -> None:
    for rank, arrived in enumerate(moved):
        assert arrived["gather"] == {f"from{r}": from_rank(r) for r in range(4) if r != rank}


def test_scatter_brings_everyones_sum_of_ones_own_rows(moved: list[dict[str, dict]]) -> None:
    for rank, arrived in enumerate(moved):
        assert arrived["scatter"] == {f"from{r}": from_rank(r, rank) for r in range(4) if r != rank}


def run_out_of_order(rank: int) -> list[dict]:
    """On a worker: three transfers between the same ranks at once; half of the ranks post them in another order."""
    transfers = Transfers(connect(None, Grid(ring_outer=4)))
    made = [traffic.hop(rank, 4, 1, tag=tag) for tag in range(3)]
    for tag, one in enumerate(made):
        one.operands[0].add_(1000 * tag)
    order = (2, 0, 1) if rank % 2 else (0, 1, 2)
    flights = {index: traffic.Flight(transfers, made[index], early=True) for index in order}
    for index in order if rank % 2 == 0 else order[::-1]:
        flights[index].start()
    found = [flights[index].wait() for index in range(3)]
    transfers.groups.close()
    return found


def test_a_message_finds_its_receive_by_its_tag(pools: Callable[[int], Pool]) -> None:
    for rank, found in enumerate(pools(4).run(run_out_of_order)):
        before = (rank - 1) % 4
        for tag, arrived in enumerate(found):
            assert arrived == {f"from{before}": [1000 * tag + row for row in from_rank(before)]}


def test_only_views_and_some_rows_are_copied_to_be_sent_and_views_once() -> None:
    """In a team-ring K and V are views, sent to the next rank once; a team's sums are sent in rows, one copy each."""
    case = Case(Plan(Grid(team=4, ring_outer=2), head_groups=1), Problem(8))
    forward = case.schedules(0)[0]
    strides = {name: contiguous((8, 2, 4, 4)) for name in "qkv"}
    program = lower(forward, case.shape, CAUSAL, strides, varlen=False)
    copied = {into for _, found in program.steps for step in found if isinstance(step, Copy) for into, _ in step.pairs}
    buffers = {program.operands[number].offset * program.shape.itemsize for number in copied}
    sent = [message for transfer in program.transfers for message in transfer.sends]
    views = [m.value for transfer in forward.transfers for m in transfer.sends if m.value.startswith("local.q")]
    assert len(views) == 3  # to each of the team
    queries = {message.operand for message in sent if message.peer in (1, 2, 3)}
    assert len({program.operands[one].offset for one in queries} & buffers) >= 1
    assert len({message.operand for message in sent[:3]}) == 1  # the three copies are one


def run_waited(rank: int) -> tuple[bool, dict]:
    """On a worker: a transfer that has been waited for holds nothing any more."""
    transfers = Transfers(connect(None, Grid(ring_outer=2)))
    flight = traffic.Flight(transfers, traffic.hop(rank, 2, 1)).start()
    flight.wait()
    transfers.groups.close()
    return flight.works == [None]


def test_a_transfer_that_is_over_holds_no_work(pools: Callable[[int], Pool]) -> None:
    assert pools(2).run(run_waited) == [True] * 2


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


@pytest.mark.parametrize("kind", traffic.TRANSFERS)
def test_transfer_carries_what_is_counted(measured: wire.Measured, kind: str) -> None:
    case = measured[kind]
    assert counted(case) <= case["carried"] <= counted(case) * (1 + HEADERS)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("scheme", traffic.PLANS)
def test_a_pass_carries_what_is_counted(measured: wire.Measured, scheme: str, direction: str) -> None:
    case = measured[f"{scheme} {direction}"]
    assert counted(case) <= case["carried"] <= counted(case) * (1 + HEADERS)


def test_counted_bytes_of_a_transfer_are_those_of_all_ranks(measured: wire.Measured) -> None:
    shard = traffic.SHARD_BYTES
    assert {kind: counted(measured[kind]) for kind in traffic.TRANSFERS} == {
        "hop": 8 * shard,
        "gather": 8 * 7 * shard,
        "scatter": 8 * 7 * shard,
    }


# --- a connection that is closed ---


class Broken:
    """A process group in which connections to one rank are closed."""

    def __init__(self, gone: int) -> None:
        self.gone = gone

    def send(self, _: list[torch.Tensor], peer: int, tag: int) -> int:
        if peer == self.gone:
            raise RuntimeError("Connection closed by peer")
        return tag

    recv = send


@pytest.mark.parametrize(("gone", "works"), [(1, [6]), (3, [6, 6, 7])])
def test_a_message_that_cannot_begin_says_to_which_rank(gone: int, works: list[int]) -> None:
    """Gloo raises there where the other end is gone already; its text names no rank."""
    peers = (0, 1, 2, 3)
    labels = [Label.of(("k",), (peer,), "team", sends=peer > 1) for peer in peers]
    receives, sends = ([MessageBuffer(peer, 0, tag) for peer in some] for some, tag in ((peers[:2], 6), (peers[2:], 7)))
    bound, posted = _in_halves(0, Broken(gone), sends, receives, labels), [None]
    with pytest.raises(RuntimeError, match="closed"):
        bound.start([torch.empty(1)], posted)
    assert posted == [works]
    broken, PROGRESS.broken = PROGRESS.broken, None
    assert broken == labels[gone]
