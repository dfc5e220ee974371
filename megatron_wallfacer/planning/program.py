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
        begun_s, issued_s: seconds after the beginning of its pass at which the host has issued its first attention
            call, and all of it. The host issues one operation after the other and waits for nothing.
    """

    number: int
    schedule: Schedule
    op: Op | None
    reads: tuple[str, ...]
    cost: Cost
    begun_s: float = 0.0
    issued_s: float = 0.0


def write_program(schedules: Sequence[Schedule], costs: Costs) -> list[Line]:
    """Of a rank whose passes have these schedules."""
    program: list[Line] = []
    for number, schedule in enumerate(schedules):
        call_s, issued_s = costs.call_host_s(schedule), 0.0
        for op, cost in zip(schedule.ops, costs.of(schedule), strict=True):
            begun_s = issued_s + (min(call_s, cost.host_s) if cost.kernel_s else cost.host_s)
            issued_s += cost.host_s
            program.append(Line(number, schedule, op, reads(op), cost, begun_s, issued_s))
        program.append(Line(number, schedule, None, (), Cost()))
    return program
