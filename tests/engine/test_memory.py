"""What a pass holds is what its schedule says that it holds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.memory import peak_bytes
from megatron_wallfacer.schedule.ops import Op, Transfer
from megatron_wallfacer.schedule.plan import Plan
from tests.engine.passes import Case, call_of, leaves
from tests.support.dense import Problem
from tests.support.pool import Pool

PUBLISHED = Grid(team=2, kv_team=2, ring_outer=2)
PLANS = {
    "ring": Plan(Grid(ring_outer=8)),
    "double ring": Plan(Grid(ring_outer=4, ring_inner=2)),
    "bidirectional ring": Plan(Grid(ring_outer=8), bidirectional=True),
    "tokenring": Plan(Grid(ring_outer=8), forward="pass-q"),
    "burst": Plan(Grid(ring_outer=4, ring_inner=2), backward="pass-q"),
    "ulysses": Plan(Grid(head=8)),
    "usp": Plan(Grid(head=2, ring_outer=4)),
    "ring of two": Plan(Grid(team=4, ring_outer=2)),
    "team-ring": Plan(Grid(team=2, ring_outer=4)),
    "team-ring, merged rows": Plan(Grid(team=2, ring_outer=4), shard_work=0),
    "team of four, merged rows, kept q": Plan(Grid(team=4, ring_outer=2), shard_work=0),
    "head x team x ring": Plan(Grid(head=2, team=2, ring_outer=2)),
    "kv_team x ring": Plan(Grid(kv_team=2, ring_outer=4)),
    "all-gather": Plan(Grid(kv_team=8)),
    "mesh": Plan(Grid(team=2, kv_team=4)),
    "wallfacer": Plan(PUBLISHED, kv_order="paper", backward="pass-q"),
    "wallfacer permuted": Plan(PUBLISHED, kv_order="permuted", backward="pass-q"),
    "usp, two head groups": Plan(Grid(head=2, ring_outer=4), head_groups=2),
    "team-ring, two head groups": Plan(Grid(team=2, ring_outer=4), head_groups=2),
    "ring of two, kept q": Plan(Grid(team=4, ring_outer=2)),
    "wallfacer, kept q": Plan(PUBLISHED, kv_order="paper", backward="pass-q"),
}
KEPT = "kept q"
#: Delta of the rank's own tokens, and other things of one number a head.
SMALL = 0.05
LOOKS, PAUSE_S = 50, 0.002


def alive(known: set[int]) -> int:
    """Bytes of the tensors that have come to life since ``gc.freeze()``, but for storages known before."""
    tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor]
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(size for pointer, size in sizes.items() if pointer not in known)


class Spy(TorchCpuKernel):
    """A kernel and an observer: notes the bytes of a pass at each call, and before and after each operation."""

    def __init__(self, known: Iterable[Tensor], counted: float) -> None:
        super().__init__()
        self.known, self.counted = {x.untyped_storage().data_ptr() for x in known}, counted
        self.most, self.doing, self.when = 0, "", ""

    def note(self) -> None:
        found = alive(self.known)
        for _ in range(LOOKS):
            if found <= max(self.most, self.counted * (1 + SMALL)):
                break
            # gloo's threads let go of what they have sent a moment after the wait for it is over.
            time.sleep(PAUSE_S)
            found = min(found, alive(self.known))
        if found > self.most:
            self.most, self.when = found, self.doing

    @contextmanager
    def record(self, what: Op | Transfer) -> Iterator[None]:
        self.doing = str(what)
        self.note()
        yield
        self.note()

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.note()
        return super().forward(*args)

    def backward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.note()
        return super().backward(*args)


@dataclass(frozen=True)
class Held:
    """Most bytes of a pass: measured, counted, and what was being done at the time."""

    measured: int
    counted: float
    when: str


def run_spied(rank: int, cases: list[Case]) -> list[tuple[Held, Held]]:
    """On a worker: forward and backward of each case."""
    return [_spied(rank, case) for case in cases]


def _spied(rank: int, case: Case, kind: type[Spy] = Spy) -> tuple[Held, Held]:
    groups = connect(None, case.plan.grid)
    counted = [peak_bytes(schedule, case.shape) for schedule in case.schedules(rank)]
    q, k, v, dout = leaves(rank, case.problem)
    gc.freeze()
    forward = kind((q, k, v), counted[0])
    out = attend(q, k, v, call_of(case, Transfers(groups), forward, forward.record))
    backward = kind((q, k, v, dout, out, *out.grad_fn.saved_tensors), counted[1])
    out.grad_fn.call = call_of(case, Transfers(groups), backward, backward.record)
    gc.freeze()
    out.backward(dout)
    gc.unfreeze()
    groups.close()
    return tuple(Held(spy.most, spy.counted, spy.when) for spy in (forward, backward))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def held(request: pytest.FixtureRequest, pools: Callable[[int], Pool]) -> dict[str, list[tuple[Held, Held]]]:
    """By plan and rank."""
    problem = Problem(8, chunk=16, q_heads=8, kv_heads=4, head_dim=64, dtype=request.param)
    cases = [Case(plan, problem, keep_gathered_q=name.endswith(KEPT)) for name, plan in PLANS.items()]
    ranks = pools(8).run(run_spied, cases)
    return {name: [results[index] for results in ranks] for index, name in enumerate(PLANS)}


@pytest.mark.parametrize("name", PLANS)
def test_bytes_alive_are_those_counted(held: dict[str, list[tuple[Held, Held]]], name: str) -> None:
    for rank, passes in enumerate(held[name]):
        for found in passes:
            assert abs(found.measured - found.counted) <= SMALL * found.counted, (rank, found)


class Leaking(Spy):
    """Keeps the results of every call."""

    def __init__(self, known: Iterable[Tensor], counted: float) -> None:
        super().__init__(known, counted)
        self.kept: list[tuple[Tensor, ...]] = []

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.kept.append(super().forward(*args))
        return self.kept[-1]

    def backward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.kept.append(super().backward(*args))
        return self.kept[-1]


def test_what_is_not_let_go_of_is_noticed(pools: Callable[[int], Pool]) -> None:
    """The measurement sees what a kernel keeps."""
    case = Case(PLANS["ring"], Problem(8, chunk=16, q_heads=8, kv_heads=4, head_dim=64, dtype=torch.float32))
    for forward, backward in pools(8).run(run_leaking, case):
        assert forward.measured > (1 + SMALL) * forward.counted
        assert backward.measured > (1 + SMALL) * backward.counted


def run_leaking(rank: int, case: Case) -> tuple[Held, Held]:
    """On a worker: a pass that forgets nothing."""
    return _spied(rank, case, Leaking)
