"""Slots: never two tensors in one at a time, and no more of them than are in flight."""

from __future__ import annotations

import pytest

from megatron_wallfacer.offload.order import Pipeline, passes_of_step
from megatron_wallfacer.offload.slots import Key, Slot, SlotPlan, Use, assign_slots, first_layers, uses_of_step

SINGLE = {0: [(0,), (1,)], 1: [(0,), (1,)]}


def plan_of(pipeline: Pipeline, micro_batches: int, groups: dict, nbytes: dict | None = None) -> SlotPlan:
    uses = uses_of_step(passes_of_step(pipeline, micro_batches), groups)
    return assign_slots(uses, nbytes or {(chunk, layer): 256 for chunk in groups for (layer,) in groups[chunk]})


def most_at_once(plan: SlotPlan) -> int:
    """Tensors in host memory at the same time, counted here."""
    alive = most = 0
    for use in plan.uses:
        alive += 1 if use.stores else -1
        most = max(most, alive)
    return most


@pytest.mark.parametrize("pipeline", [Pipeline(chunks=None), Pipeline(4, 0), Pipeline(4, 3), Pipeline(2, 0, 2)])
@pytest.mark.parametrize("micro_batches", [1, 4, 8])
def test_a_slot_holds_one_tensor_at_a_time(pipeline: Pipeline, micro_batches: int) -> None:
    plan = plan_of(pipeline, micro_batches, SINGLE if pipeline.chunks else {0: SINGLE[0]})
    occupied: dict[Slot, Key] = {}
    for use in plan.uses:
        slot = plan.slots[use.key]
        if use.stores:
            assert slot not in occupied
            occupied[slot] = use.key
        else:
            assert occupied.pop(slot) == use.key
    assert not occupied
    assert len(set(plan.slots.values())) == most_at_once(plan)
    assert plan.nbytes == 256 * most_at_once(plan)


def test_micro_batches_in_flight_are_counted() -> None:
    """The first of four stages holds four micro-batches at most, the last one; interleaved stages more."""
    one_layer = {0: [(0,)]}
    assert [plan_of(Pipeline(4, rank), 8, one_layer).nbytes // 256 for rank in range(4)] == [4, 3, 2, 1]
    assert plan_of(Pipeline(4, 0), 2, one_layer).nbytes == 2 * 256
    # 2 x (2 - 0 - 1) + 2 forward passes come before the first backward pass, and one in front of each.
    assert plan_of(Pipeline(2, 0, 2), 8, {0: [(0,)], 1: [(0,)]}).nbytes == 5 * 256


def test_layers_that_are_recomputed_together_come_back_in_ascending_order() -> None:
    uses = uses_of_step(passes_of_step(Pipeline(), 1), {0: [(0, 1), (2, 3)]})
    assert [(use.stores, use.key.layer) for use in uses] == [
        *((True, layer) for layer in range(4)),
        *((False, layer) for layer in (2, 3, 0, 1)),
    ]


def test_layers_of_another_size_have_slots_of_their_own() -> None:
    plan = plan_of(Pipeline(), 2, {0: [(0,), (1,)]}, {(0, 0): 256, (0, 1): 512})
    assert set(plan.slots.values()) == {Slot(256, 0), Slot(512, 0)}


def test_the_first_layers_of_all_chunks_together() -> None:
    groups = {0: [(0, 1), (2,)], 1: [(0,), (1,)]}
    assert first_layers(groups, 4) == {0: ((0, 1), (2,)), 1: ((0,),)}
    assert first_layers(groups, 1) == {0: ((0,),), 1: ()}
    assert first_layers(groups, 0) == {0: (), 1: ()}


def test_uses_name_their_micro_batch() -> None:
    uses = uses_of_step(passes_of_step(Pipeline(2, 0), 2), {0: [(0,)]})
    assert uses == (
        Use(True, Key(0, 0, 0)),
        Use(True, Key(0, 0, 1)),
        Use(False, Key(0, 0, 0)),
        Use(False, Key(0, 0, 1)),
    )
