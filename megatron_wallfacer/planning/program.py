"""The program of a rank: the operations of all its passes in order, each with its inputs and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_wallfacer.planning.costs import CostModel, OpCost
from megatron_wallfacer.schedule.ops import Op, Schedule, reads


@dataclass(frozen=True, slots=True)
class TimedOp:
    """An operation of a program.

    Attributes:
        pass_number: index of the pass.
        schedule: schedule of the pass.
        op: operation; None at the end of the pass.
        reads: names of the values that the operation reads.
        cost: cost of the operation.
        first_issued_s: seconds from the start of the pass until the host has issued the first attention call of the
            operation. The host issues one operation after the other without waiting.
        issued_s: seconds from the start of the pass until the host has issued the whole operation.
    """

    pass_number: int
    schedule: Schedule
    op: Op | None
    reads: tuple[str, ...]
    cost: OpCost
    first_issued_s: float = 0.0
    issued_s: float = 0.0

    @property
    def name(self) -> str:
        """Name of the operation's type; empty at the end of the pass."""
        return "" if self.op is None else type(self.op).__name__


def rank_program(schedules: Sequence[Schedule], costs: CostModel) -> list[TimedOp]:
    """Return the program of a rank.

    Args:
        schedules: schedules of the rank's passes, in order.
        costs: costs of operations.
    """
    program: list[TimedOp] = []
    for number, schedule in enumerate(schedules):
        call_s, issued_s = costs.call_host_s(schedule), 0.0
        for op, cost in zip(schedule.ops, costs.op_costs(schedule), strict=True):
            first_issued_s = issued_s + (min(call_s, cost.host_s) if cost.kernel_s else cost.host_s)
            issued_s += cost.host_s
            program.append(TimedOp(number, schedule, op, reads(op), cost, first_issued_s, issued_s))
        program.append(TimedOp(number, schedule, None, (), OpCost()))
    return program
