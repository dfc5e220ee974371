"""Tensors of messages: both ends of each message have the same ones, whatever carries it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_wallfacer.schedule.messages import MessageTensor, message_tensors
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.program import AllToAll, Program
from tests.schedule.cases import all_plans
from tests.schedule.test_lower import lowered, shape_of, strides_of

SIZES = (4, 6, 8)


def tensors(program: Program, plan: Plan) -> tuple[list[MessageTensor], list[MessageTensor]]:
    """(sent, received)."""
    heads = 2 * plan.grid.head, 2 * plan.grid.head
    found = message_tensors(program, strides_of(shape_of(heads), program.schedule, plan.grid.head)).values()
    return [one for transfer in found for one in transfer.sends], [
        one for transfer in found for one in transfer.receives
    ]


def shapes(ends: list[MessageTensor]) -> dict[tuple[int, int, str, str], tuple[int, ...]]:
    """Shape of each tensor by peer, tag, axis and name."""
    found = {}
    for one in ends:
        rows = sum(piece.shape[0] for piece in one.pieces)
        found[one.peer, one.tag, one.axis, one.name] = (rows, *one.pieces[0].shape[1:])
    assert len(found) == len(ends)
    return found


def cases() -> Iterator[tuple[Plan, bool]]:
    return ((plan, backward) for size in SIZES for plan in all_plans(size) for backward in (False, True))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("size", SIZES)
def test_both_ends_have_the_same_tensors(size: int, backward: bool) -> None:
    for plan in all_plans(size):
        both = [tensors(lowered(plan, rank, backward=backward), plan) for rank in range(size)]
        sent, received = ([shapes(ends[which]) for ends in both] for which in (0, 1))
        for rank in range(size):
            for (peer, *message), shape in sent[rank].items():
                assert received[peer].pop((rank, *message)) == shape, plan
        assert not any(received), plan


def test_an_all_to_all_carries_the_same_tensors_from_the_same_places() -> None:
    exchanges = 0
    for plan, backward in cases():
        if plan.grid.head == 1:
            continue
        one, other = (lowered(plan, 1, backward=backward, all_to_all=way) for way in (False, True))
        exchanges += sum(isinstance(transfer, AllToAll) for transfer in other.transfers)
        assert tensors(one, plan) == tensors(other, plan), plan
    assert exchanges
