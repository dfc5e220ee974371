"""A rank's program: the operations of all its passes in a row, each with what it waits for and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_wallfacer.planning.costs import Cost, Costs
from megatron_wallfacer.schedule.ops import Op, Schedule, reads


@dataclass(frozen=True, slots=True)
class Line:
    """An operation.

    Attributes:
        number: of the pass.
        schedule: of the pass.
        op: None ends the pass.
        reads: the names it waits for.
        cost: what it takes.
    """

    number: int
    schedule: Schedule
    op: Op | None
    reads: tuple[str, ...]
    cost: Cost


def write_program(schedules: Sequence[Schedule], costs: Costs) -> list[Line]:
    """Of a rank whose passes have these schedules."""
    program: list[Line] = []
    for number, schedule in enumerate(schedules):
        of_each = costs.of(schedule)
        program += [Line(number, schedule, op, reads(op), of_each[at]) for at, op in enumerate(schedule.ops)]
        program.append(Line(number, schedule, None, (), Cost()))
    return program
