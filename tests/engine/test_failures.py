"""After an exception in a pass: no rank hangs, every rank names the first cause, and groups can be made anew."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_wallfacer.attention import forget_groups
from megatron_wallfacer.engine import failures
from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.connections import connected
from megatron_wallfacer.engine.groups import CPU
from megatron_wallfacer.engine.transfers import BoundTransfer, Transfers
from megatron_wallfacer.engine.waits.progress import PROGRESS
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from tests.engine.passes import Case as Attention
from tests.engine.passes import call_of, errors, leaves, run_case
from tests.support.dense import Problem
from tests.support.pool import Pool

PROBLEM = Problem(4, kv_heads=4)
PLANS = {
    "ring": Plan(Grid(ring_outer=4)),
    "team-ring": Plan(Grid(team=2, ring_outer=2), backward="pass-q"),
    "heads": Plan(Grid(head=4)),
    "published": Plan(Grid(team=2, kv_team=2), kv_order="paper", backward="pass-q"),
}
ERRORS = {"memory": torch.OutOfMemoryError, "interrupt": KeyboardInterrupt}


@dataclass(frozen=True)
class Fault:
    """Where an exception is raised.

    Attributes:
        error: name of its type.
        place: ``forward`` or ``backward`` of the kernel, ``wait`` of a transfer, or ``row_sums`` before backward.
        ranks: ranks that raise it.
        tile: which tile of the pass raises, of a kernel.
    """

    error: str
    place: str
    ranks: tuple[int, ...]
    tile: int = 1


FAULTS = [
    ("ring", Fault("memory", "forward", (0, 1, 2, 3), tile=2)),
    ("ring", Fault("interrupt", "wait", (1,))),
    ("ring", Fault("memory", "backward", (2,))),
    ("team-ring", Fault("memory", "row_sums", (3,))),
    ("team-ring", Fault("interrupt", "backward", (0, 1, 2, 3))),
    ("heads", Fault("memory", "forward", (0,))),
    ("published", Fault("memory", "backward", (1,))),
]


class Broken(TorchCpuKernel):
    """A kernel that raises in one tile of a pass."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.place, self.error, self.left = fault.place, ERRORS[fault.error], fault.tile

    def _tile(self, place: str) -> None:
        if place == self.place:
            self.left -= 1
            if not self.left:
                raise self.error("no room\nfor a tile")

    def forward(self, *args: Any) -> Any:
        self._tile("forward")
        return super().forward(*args)

    def backward(self, *args: Any) -> Any:
        self._tile("backward")
        return super().backward(*args)


def broken_waits(transfers: Transfers, error: type[BaseException]) -> None:
    """Let every wait of transfers that are bound from now on raise."""
    bind = transfers.bind

    def bound(*args: Any) -> BoundTransfer:
        def wait(operands: Any, works: Any) -> None:
            raise error("no room\nfor a message")

        return bind(*args)._replace(wait=wait)

    transfers.bind = bound


def one_step(rank: int, call: Call) -> str:
    """The error of a forward and a backward pass; ``done`` if there is none."""
    q, k, v, dout = leaves(rank, PROBLEM)
    try:
        attend(q, k, v, call).backward(dout)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def run_faults(rank: int, faults: list[tuple[str, Fault]]) -> list[tuple[Any, ...]]:
    """On a worker: of each fault the first error and seconds until it, the next one, a sum over the world, results."""
    found: list[tuple[Any, ...]] = []
    for name, fault in faults:
        plan, error = PLANS[name], ERRORS[fault.error]
        transfers, kernel = connected(None, plan.grid, "direct", CPU), TorchCpuKernel()
        other = connected(None, Grid(kv_team=4), "direct", CPU)
        raises = rank in fault.ranks
        if raises and fault.place in ("forward", "backward"):
            kernel = Broken(fault)
        if raises and fault.place == "wait":
            broken_waits(transfers, error)
        call, right = (Call(plan, Runtime(transfers, one, 0.3), layer=7) for one in (kernel, TorchCpuKernel()))
        with pytest.MonkeyPatch.context() as patch:
            if raises and fault.place == "row_sums":
                patch.setattr("megatron_wallfacer.engine.operators.row_sums", _no_memory)
            start = time.monotonic()
            first = one_step(rank, call)
            seconds = time.monotonic() - start
        again = one_step(rank, right), one_step(rank, Call(Plan(Grid(kv_team=4)), Runtime(other, kernel, 0.3)))
        total = torch.ones(1)
        dist.all_reduce(total)
        forget_groups()
        found.append((first, seconds, again, total.item(), run_case(rank, Attention(plan, PROBLEM))))
        forget_groups()
    return found


def _no_memory(*args: Any) -> None:
    raise torch.OutOfMemoryError("no room\nfor sums")


@pytest.fixture(scope="module")
def outcomes(pools: Callable[[int], Pool]) -> list[list[tuple[Any, ...]]]:
    return pools(4).run(run_faults, FAULTS)


@pytest.mark.parametrize("index", range(len(FAULTS)), ids=[f"{n}-{f.place}-{len(f.ranks)}" for n, f in FAULTS])
def test_every_rank_names_the_first_cause(outcomes: list[list[tuple[Any, ...]]], index: int) -> None:
    _, fault = FAULTS[index]
    name = ERRORS[fault.error].__name__
    phase = "forward" if fault.place in ("forward", "wait") else "backward"
    raised = [f"rank {rank} failed in the {phase} pass of layer 7: {name}: no room" for rank in fault.ranks]
    causes = set()
    for rank in range(4):
        first, seconds, again, total, _ = outcomes[rank][index]
        assert seconds < 30
        own, theirs = f"{name}: no room", tuple(f"WallfacerError: {one}; attention's groups are" for one in raised)
        # Where all raise, some may wait for the first and learn of it before their own turn.
        wanted = (own,) if fault.ranks == (rank,) else theirs if rank not in fault.ranks else (own, *theirs)
        assert first.startswith(wanted), first
        # The next call is rejected at once, over this grid and over any other of the same ranks.
        for text in again:
            cause, _, advice = text.removeprefix("WallfacerError: ").partition("; ")
            causes.add(cause)
            assert advice == (
                "attention's groups are closed: start the job again, or call forget_groups() on every rank"
            )
        # The caller's own group is left alone.
        assert total == 4
    assert len(causes) == 1
    assert causes <= set(raised)


@pytest.mark.parametrize("index", range(len(FAULTS)), ids=[f"{n}-{f.place}-{len(f.ranks)}" for n, f in FAULTS])
def test_groups_that_are_made_anew_are_exact(outcomes: list[list[tuple[Any, ...]]], index: int) -> None:
    results: list[list[np.ndarray]] = [outcomes[rank][index][4] for rank in range(4)]
    assert max(errors(PROBLEM, results).values()) <= 1e-12


def run_large(rank: int) -> tuple[float, list[str]]:
    """On a worker: seconds and outcomes of two forward passes. Rank 1 fails while it receives 64 MiB from rank 0."""
    plan, kernel = Plan(Grid(ring_outer=2)), TorchCpuKernel() if rank == 0 else Broken(Fault("memory", "forward", (1,)))
    call = Call(plan, Runtime(connected(None, plan.grid, "direct", CPU), kernel, 0.3), layer=7)
    q, k, v = (torch.zeros(2, 1, 2**16, 32, dtype=torch.float64) for _ in "qkv")
    outcomes, start = list[str](), time.monotonic()
    for _ in range(2):
        try:
            attend(q, k, v, call)
            outcomes.append("done")
        except (torch.OutOfMemoryError, WallfacerError) as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    seconds = time.monotonic() - start
    # Works would keep the tensors of the failed pass.
    assert PROGRESS.in_flight == ()
    forget_groups()
    return seconds, outcomes


def test_a_large_message_in_flight_does_not_hang(pools: Callable[[int], Pool]) -> None:
    """gloo does not end the send of a message of which a part has been written when the receiver closes."""
    cause = "WallfacerError: rank 1 failed in the forward pass of layer 7: OutOfMemoryError: no room"
    for _ in range(3):
        (seconds, (first, second)), (_, (own, again)) = pools(2).run(run_large)
        assert own == "OutOfMemoryError: no room\nfor a tile"
        # All messages of rank 0 in the first pass may have arrived.
        assert first == "done" or first.startswith(cause)
        assert all(text.startswith(cause) for text in (second, again))
        assert seconds < 30


# --- without ranks ---


def test_one_process_has_nothing_to_close() -> None:
    transfers = SimpleNamespace(groups=SimpleNamespace(grid=Grid()), failure="")
    failures.fail(SimpleNamespace(runtime=SimpleNamespace(transfers=transfers)), "forward", MemoryError())
    assert transfers.failure == ""


def test_an_error_of_arguments_closes_nothing() -> None:
    case = Attention(Plan(Grid()), Problem(1))
    transfers = connected(None, Grid(), "direct", CPU)
    q, k, v, _ = leaves(0, Problem(1))
    call = call_of(Attention(Plan(Grid(), head_groups=1), Problem(1, documents=(0, 9))), transfers)
    with pytest.raises(WallfacerError, match=r"cu_seqlens=\[\.\.\., 9\]"):
        attend(q, k, v, call)
    assert transfers.failure == ""
    attend(q, k, v, call_of(case, transfers))


def test_a_second_interrupt_does_not_keep_connections_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process may catch the interrupt and live on: other ranks would then wait for the timeout of the group."""
    closed: list[int] = []

    class Work:
        def is_completed(self) -> bool:
            return False

        def wait(self, timeout: object) -> None:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(PROGRESS, "in_flight", [None, [Work()]])
    monkeypatch.setattr(failures, "is_alive", lambda group: True)
    monkeypatch.setattr(failures, "_first_cause", lambda groups, own: own)
    receive = lambda tensors, peer, tag: closed.append(peer) or Work()  # noqa: E731
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0, recv=receive)
    grids = [SimpleNamespace(groups=SimpleNamespace(number=0, backend="gloo", made=[group]), failure="")]
    # Parallel test runs ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            failures._close(grids, "rank 0 failed")
    finally:
        signal.signal(signal.SIGINT, before)
    assert closed == [1]
    assert PROGRESS.in_flight == ()


def test_grids_of_one_group_have_one_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that fail at the same time: another rank may be the first to store its cause under each key."""
    stored = {3: "rank 1 failed", 5: "rank 3 failed"}
    monkeypatch.setattr(failures, "_first_cause", lambda groups, own: stored[groups.number])
    monkeypatch.setattr(failures, "_close_connections", lambda groups: None)
    grids = [SimpleNamespace(groups=SimpleNamespace(number=number), failure="") for number in (5, 3)]
    failures._close(grids, "rank 0 failed")
    assert {one.failure for one in grids} == {"rank 1 failed"}
    failures._close([], "rank 0 failed")
