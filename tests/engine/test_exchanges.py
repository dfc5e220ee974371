"""A head exchange as one all-to-all gives bit by bit what its messages give."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch

from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.transfers import BoundTransfer, Transfers
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.program import AllToAll, PointToPoint
from tests.engine.passes import Case, call_of, leaves
from tests.support.dense import Problem
from tests.support.pool import Pool

BF16 = torch.bfloat16
CASES = [
    Case(Plan(Grid(head=4)), Problem(4, batch=2, dtype=BF16)),
    # Sizes that need padding, and kv heads that several ranks share.
    Case(Plan(Grid(head=4)), Problem(4, chunk=3, q_heads=4, kv_heads=1, head_dim=5, dtype=torch.float32)),
    Case(Plan(Grid(head=2, ring_outer=2), head_groups=2), Problem(4, q_heads=8, kv_heads=4, dtype=BF16)),
    Case(Plan(Grid(head=2, team=2), backward="pass-q"), Problem(4, documents=(0, 3, 16), dtype=BF16)),
]


class AllToAllTransfers(Transfers):
    """Transfers whose backend has the collective: gloo has it on a CPU.

    Attributes:
        exchanges: number of transfers that are one collective.
    """

    all_to_all, exchanges = True, 0

    def bind(self, number: int, transfer: PointToPoint | AllToAll, device: torch.device) -> BoundTransfer:
        self.exchanges += isinstance(transfer, AllToAll)
        return super().bind(number, transfer, device)


def run_pass(transfers: Transfers, case: Case, rank: int) -> list[bytes]:
    """On a worker: out, dq, dk, dv."""
    q, k, v, dout = leaves(rank, case.problem)
    out = attend(q, k, v, call_of(case, transfers))
    out.backward(dout)
    return [x.detach().contiguous().view(torch.uint8).numpy().tobytes() for x in (out, q.grad, k.grad, v.grad)]


def run_both(rank: int, cases: list[Case]) -> list[tuple[bool, bool, int]]:
    """On a worker: whether results and received bytes are the same, and the number of collectives."""
    found = []
    for case in cases:
        groups = connect(None, case.plan.grid)
        messages, collectives = Transfers(groups), AllToAllTransfers(groups)
        same = run_pass(messages, case, rank) == run_pass(collectives, case, rank)
        found.append((same, messages.received == collectives.received, collectives.exchanges))
        groups.close()
    return found


def test_one_collective_gives_what_messages_give(pools: Callable[[int], Pool]) -> None:
    for found in pools(4).run(run_both, CASES):
        # q, kv and the output; the output's gradient, dq, dkv.
        assert found == [(True, True, 6 * case.groups) for case in CASES]


def run_wrong_ranks(rank: int) -> str:
    """On a worker: an exchange whose parts are in another order than the group's ranks."""
    groups = connect(None, Grid(head=2))
    try:
        Transfers(groups).bind(0, AllToAll(("head", "inputs"), (1, 0), 0, 1), torch.device("cpu"))
    except WallfacerError as error:
        return str(error)
    finally:
        groups.close()
    return ""


def test_parts_in_another_order_than_the_group_are_an_error(pools: Callable[[int], Pool]) -> None:
    assert set(pools(2).run(run_wrong_ranks)) == {"ranks=[1, 0]: must be all 2 ranks of the head axis in order"}


@pytest.mark.parametrize(("backend", "collective"), [("gloo", False), ("nccl", True)])
def test_nccl_has_the_collective_and_gloo_receives_early_instead(backend: str, collective: bool) -> None:
    assert Transfers(mock.Mock(backend=backend)).all_to_all is collective
