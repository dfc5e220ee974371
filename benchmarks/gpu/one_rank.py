"""One rank of a context-parallel group, alone: its kernels, merges and copies are real, its messages are not.

What it would receive is there at once. So a single process stands for any rank of any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine import operators
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.engine.timeline import Observer, no_observer
from megatron_wallfacer.engine.transfers import BoundTransfer, Transfers
from megatron_wallfacer.kernels.protocol import Kernel, accumulation_dtype
from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.memory import workspace
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.program import PointToPoint
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape


class NoTransfers(Transfers):
    """Whatever is received has arrived, with the numbers that its memory held."""

    def bind(self, number: int, transfer: PointToPoint, device: torch.device) -> BoundTransfer:
        return BoundTransfer(None, _nothing, _nothing)


def no_transfers(plan: Plan) -> NoTransfers:
    """Return the transfers of the busiest rank of a plan, which sends nothing."""
    size = plan.grid.cp_size
    return NoTransfers(AxisGroups(plan.grid, busiest_rank(plan), tuple(range(size)), ("node",) * size, {}))


def _nothing(operands: Sequence[Tensor], works: list[Any]) -> None:
    """A message that is there at once."""


@dataclass
class OneRank:
    """Attention of the busiest rank of a plan, causal, batch 1.

    Args:
        plan: its grid says how many ranks there are.
        tokens: of the whole sequence.
        heads: (query, kv).
        head_dim: channels of a head.
        kernel: the local one.
        device: where.
        dtype: of q, k, v.
        observer: who looks on.
    """

    plan: Plan
    tokens: int
    heads: tuple[int, int]
    head_dim: int
    kernel: Kernel
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    observer: Observer = no_observer
    call: Call = field(init=False)

    def __post_init__(self) -> None:
        runtime = Runtime(no_transfers(self.plan), self.kernel, self.head_dim**-0.5, self.observer)
        self.call = Call(self.plan, runtime)

    @property
    def shard(self) -> int:
        """Tokens of a rank."""
        return self.tokens // self.plan.grid.cp_size

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and dout, sbhd."""
        q_heads, kv_heads = self.heads
        options = {"device": self.device, "dtype": self.dtype}
        shapes = [(self.shard, 1, heads, self.head_dim) for heads in (q_heads, kv_heads, kv_heads, q_heads)]
        q, k, v, dout = (torch.randn(shape, **options) for shape in shapes)
        self._fill_workspaces()
        return q, k, v, dout

    def schedules(self) -> tuple[Schedule, Schedule]:
        """Forward and backward."""
        return self.call.schedule(forward_schedule, self.shape), self.call.schedule(backward_schedule, self.shape)

    @property
    def shape(self) -> Shape:
        """Sizes of the rank's shard."""
        wide = accumulation_dtype(self.dtype).itemsize
        sizes = {"itemsize": self.dtype.itemsize, "accumulate_itemsize": wide}
        return Shape(self.shard, *self.heads, self.head_dim, **sizes)

    def _fill_workspaces(self) -> None:
        """Leave numbers in the memory that the passes are given: PyTorch's allocator gives out the same blocks again.

        Received rows are then numbers of the right size, so kernels draw the power that they draw in a run.
        """
        for schedule in self.schedules():
            nbytes = workspace(schedule, self.shape).nbytes
            torch.randn(nbytes // self.dtype.itemsize, device=self.device, dtype=self.dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(out, lse, kept)."""
        return operators.attention(q, k, v, None, self.call.number)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, done: tuple[Tensor, Tensor, list[Tensor]]
    ) -> tuple[Tensor, ...]:
        """(dq, dk, dv, nothing)."""
        out, lse, kept = done
        inputs = [] if self.plan.grid.head > 1 else [q, k, v]
        return operators.attention_backward(
            dout, out, lse, None, kept, inputs, k.shape[2], self.head_dim, self.call.number
        )
