"""Held results: what a lowered program holds is what the schedule is said to hold."""

from __future__ import annotations

import pytest

from megatron_wallfacer.schedule import held as held_results
from megatron_wallfacer.schedule import program as steps
from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.held import LARGE, accumulations, held_bytes, holds_results
from megatron_wallfacer.schedule.lifetimes import aliases
from megatron_wallfacer.schedule.program import Program
from megatron_wallfacer.schedule.schemes import make_plan
from tests.schedule.cases import all_plans
from tests.schedule.test_lower import lowered


def held(program: Program) -> int:
    """Most bytes of the results of calls, of the one that runs and of those that wait."""
    shape, sizes, most = program.shape, {}, 0
    for _, found in program.steps:
        for step in found:
            match step:
                case steps.AttendForward(slot=slot, tile=tile):
                    assert slot not in sizes
                    out = shape.q_heads // program.schedule.head_slices * tile.height
                    sizes[slot] = out * ((shape.v_head_dim or shape.head_dim) * shape.itemsize + 4)
                case steps.AttendBackward(slot=slot, tile=tile):
                    assert slot not in sizes
                    q, kv = (heads // program.schedule.head_slices for heads in (shape.q_heads, shape.kv_heads))
                    row = q * shape.head_dim
                    column = kv * (shape.head_dim + (shape.v_head_dim or shape.head_dim))
                    sizes[slot] = (row * tile.height + column * tile.width) * shape.itemsize
                case steps.Merge(frees=frees) | steps.Sum(frees=frees):
                    for slot in frees:
                        del sizes[slot]
            most = max(most, sum(sizes.values()))
    assert not sizes
    return most


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 6])
def test_a_program_holds_what_its_schedule_is_said_to_hold(cp_size: int, backward: bool) -> None:
    for plan in all_plans(cp_size):
        for rank in {0, busiest_rank(plan)}:
            program = lowered(plan, rank, backward=backward)
            schedule = program.schedule
            assert held(program) == held_bytes(schedule, program.shape, aliases(schedule)), (plan, rank)
            lists = sum(isinstance(step, steps.Merge | steps.Sum) for _, found in program.steps for step in found)
            assert lists <= sum(accumulations(schedule, program.shape, aliases(schedule)).values()) + 1


def test_results_of_large_calls_are_accumulated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan("ring", 4, q_heads=4, kv_heads=4)
    size = lowered(plan, 3, backward=False).shape.bytes("q")
    calls, most = {}, {}
    for large in (LARGE, size):
        monkeypatch.setattr(held_results, "LARGE", large)
        program = lowered(plan, 3, backward=False)
        assert holds_results(program.shape) == (large == LARGE)
        most[large] = held(program)
        assert most[large] == held_bytes(program.schedule, program.shape, aliases(program.schedule))
        calls[large] = sum(accumulations(program.schedule, program.shape, aliases(program.schedule)).values())
    assert most[size] < most[LARGE]
    assert (calls[LARGE], calls[size]) == (2, 4 + 1)
