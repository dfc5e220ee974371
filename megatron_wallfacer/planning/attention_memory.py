"""Memory that attention allocates on one rank in each pass, computed from the schedules of the rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.held import held_bytes
from megatron_wallfacer.schedule.lifetimes import aliases
from megatron_wallfacer.schedule.memory import graph_bytes, peak_bytes, result_bytes, returned_bytes
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape


@dataclass(frozen=True)
class AttentionMemory:
    """Bytes of one attention layer on one rank, without the tensors that attention returns (out, lse; dq, dk, dv).

    Attributes:
        forward: bytes that the forward pass allocates for its workspace and the results of its kernels.
        backward: bytes that the backward pass allocates.
        kept: bytes of q, k and v after an exchange along the head axis, and of gathered queries with
            ``--wallfacer-keep-gathered-q``. Forward keeps these tensors for backward.
        graphs: bytes that the CUDA graphs of the passes occupy during the whole run.
        exchanges_heads: whether the grid has a head axis. If so, the ``kept`` bytes are saved instead of q, k and v.
    """

    forward: float = 0.0
    backward: float = 0.0
    kept: float = 0.0
    graphs: float = 0.0
    exchanges_heads: bool = False

    def scaled(self, factor: float) -> AttentionMemory:
        """Return the sizes for another number of tokens per rank. ``factor`` is new tokens / old tokens."""
        sizes = (self.forward, self.backward, self.kept, self.graphs)
        return AttentionMemory(*(factor * size for size in sizes), self.exchanges_heads)


def attention_memory(
    plan: Plan, schedules: Sequence[Schedule], shape: Shape, *, cuda_graphs: bool = False
) -> AttentionMemory:
    """Return the memory that the passes of one rank allocate, given its forward and its backward schedule."""
    kept = returned_bytes(schedules[0], shape) - result_bytes(schedules[0], shape)
    exchanges = plan.grid.head > 1
    if cuda_graphs:
        held = sum(
            graph_bytes(schedule, shape) + held_bytes(schedule, shape, aliases(schedule)) for schedule in schedules
        )
        return AttentionMemory(0.0, 0.0, kept, held, exchanges)
    forward, backward = (peak_bytes(schedule, shape) - returned_bytes(schedule, shape) for schedule in schedules)
    return AttentionMemory(forward, backward, kept, 0.0, exchanges)


def busiest_rank_memory(
    plan: Plan, shape: Shape, *, keep_gathered_q: bool = False, cuda_graphs: bool = False
) -> AttentionMemory:
    """Return the memory of both passes on the rank with the most work under a causal mask."""
    rank, groups = busiest_rank(plan), head_groups(plan, shape.q_heads, shape.kv_heads)
    passes = [
        build(plan, rank, groups=groups, keep_gathered_q=keep_gathered_q)
        for build in (forward_schedule, backward_schedule)
    ]
    return attention_memory(plan, passes, shape, cuda_graphs=cuda_graphs)
