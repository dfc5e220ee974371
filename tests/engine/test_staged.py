"""Messages through host memory bring the same bytes; and nobody gets them without asking."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.staged import TRANSFERS, StagedTransfers, check_transfers
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from tests.engine.passes import Case, call_of, leaves
from tests.support.dense import Problem
from tests.support.pool import Pool

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLANS = (
    Plan(Grid(team=2, ring_outer=2)),
    Plan(Grid(team=2, kv_team=2), kv_order="paper", backward="pass-q"),
    Plan(Grid(head=2, ring_outer=2), bidirectional=True),
)
PROBLEM = Problem(4, q_heads=8, kv_heads=4, dtype=torch.float32)


class Counting(StagedTransfers):
    """Counts what passes through the host."""

    landed = departed = 0

    def _landing(self, message: Tensor) -> Tensor:
        landing = super()._landing(message)
        assert landing.device.type == "cpu"
        assert landing.data_ptr() != message.data_ptr()
        self.landed += 1
        return landing

    def _departing(self, message: Tensor) -> Tensor:
        self.departed += 1
        return super()._departing(message)


def run_both(rank: int, plan: Plan) -> tuple[list[list[np.ndarray]], list[dict], tuple[int, int]]:
    """On a worker, direct and staged: results; received bytes; messages through the host in and out."""
    groups = connect(None, plan.grid)
    both = Transfers(groups), Counting(groups)
    results = []
    for transfers in both:
        q, k, v, dout = leaves(rank, PROBLEM)
        out = attend(q, k, v, call_of(Case(plan, PROBLEM), transfers))
        out.backward(dout)
        results.append([x.detach().numpy() for x in (out, q.grad, k.grad, v.grad)])
    groups.close()
    return results, [dict(transfers.received) for transfers in both], (both[1].landed, both[1].departed)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: str(plan.grid))
def test_staged_results_are_the_direct_ones(plan: Plan, pools: Callable[[int], Pool]) -> None:
    for (direct, staged), (wanted, got), (landed, departed) in pools(4).run(run_both, plan):
        for one, other in zip(direct, staged, strict=True):
            assert np.array_equal(one, other)
        assert got == wanted
        assert landed > 0
        assert departed > 0


@pytest.mark.parametrize(
    ("kind", "device", "backend", "message"),
    [
        ("pigeon", CPU, "gloo", "one of direct, staged"),
        ("staged", GPU, "nccl", "direct where the backend is nccl"),
        ("direct", CPU, "cuda:nccl", "used with a backend for cpu tensors: cuda:nccl has none"),
        ("direct", GPU, "gloo", "staged where the backend is gloo and tensors lie on a GPU"),
    ],
)
def test_what_cannot_be_moved_so_is_rejected(kind: str, device: torch.device, backend: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_transfers(kind, device, backend)


@pytest.mark.parametrize(
    ("kind", "device", "backend"),
    [("direct", CPU, "gloo"), ("direct", GPU, "nccl"), ("staged", GPU, "gloo"), ("staged", CPU, None)],
)
def test_what_can(kind: str, device: torch.device, backend: str | None) -> None:
    check_transfers(kind, device, backend)


def test_a_kind_is_what_it_says() -> None:
    groups = connect(None, Grid())
    assert type(TRANSFERS["direct"](groups)) is Transfers
    assert type(TRANSFERS["staged"](groups)) is StagedTransfers
