"""The bytes that a pass allocates.

A pass allocates its results, the values that it keeps for backward, and one workspace for all other buffers. A pass
also holds the results of a few attention calls (:mod:`megatron_wallfacer.schedule.held`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from megatron_wallfacer.schedule.held import held_bytes
from megatron_wallfacer.schedule.lifetimes import aliases, head_exchange_ranks, lifetimes, value_key
from megatron_wallfacer.schedule.ops import KV_TENSORS, STATISTICS, Schedule, View
from megatron_wallfacer.schedule.volume import Shape, rows_bytes, value_bytes
from megatron_wallfacer.schedule.workspace import Buffer, WorkspaceLayout, arrange


def workspace(schedule: Schedule, shape: Shape) -> WorkspaceLayout:
    """Return the offset of each buffer in the workspace of a pass."""
    kept, order = kept_buffers(schedule), head_exchange_ranks(schedule)
    return arrange(
        Buffer(one.key, one.first, one.last, int(rows_bytes(schedule, shape, one.payload, one.chunks)))
        for one in sorted(lifetimes(schedule), key=lambda one: order.get(one.key, -1))
        if one.key not in kept
    )


def kept_buffers(schedule: Schedule) -> dict[Hashable, str]:
    """Return a map from buffer key to value name, for all values that are kept for backward."""
    buffers = aliases(schedule)
    return {value_key(buffers.get(name, name)): name for name in schedule.keeps}


def result_tensors(schedule: Schedule) -> tuple[str, ...]:
    """Return the names of the tensors that a pass returns."""
    return ("dq", "dk", "dv") if schedule.backward else ("out", "lse")


def result_is_wide(schedule: Schedule, shape: Shape, tensor: str, *, sinks: bool = False) -> bool:
    """Return whether a result tensor has the accumulation dtype.

    This holds for lse, and for out with sinks. It also holds for dk and dv if several head slices use one kv head.
    """
    shared = tensor in KV_TENSORS and schedule.head_slices > shape.kv_heads
    return shared or tensor in STATISTICS or (sinks and tensor == "out")


def result_bytes(schedule: Schedule, shape: Shape) -> int:
    """Return the bytes of the results of a pass."""
    return sum(
        shape.elements(tensor)
        * (shape.itemsize_of(tensor) if result_is_wide(schedule, shape, tensor) else shape.itemsize)
        for tensor in result_tensors(schedule)
    )


def peak_bytes(schedule: Schedule, shape: Shape) -> int:
    """Return the bytes that a pass allocates: workspace, results, kept values, and pending results of attention calls.

    Memory that a kernel allocates internally is not included.
    """
    held = held_bytes(schedule, shape, aliases(schedule))
    return workspace(schedule, shape).nbytes + returned_bytes(schedule, shape) + held


def returned_bytes(schedule: Schedule, shape: Shape) -> int:
    """Return the bytes of the results of a pass and of the values that it keeps for backward."""
    return result_bytes(schedule, shape) + sum(value_bytes(schedule, shape, name) for name in schedule.keeps)


def graph_bytes(schedule: Schedule, shape: Shape) -> int:
    """Return the bytes that a pass needs as a CUDA graph: its buffers, and static copies of all tensors that it reads.

    Memory that kernels allocate is not included, because the memory pool of the graphs contains it.
    """
    viewed = {tensor for op in schedule.ops if isinstance(op, View) for tensor in schedule.values[op.into].payload}
    # With a head axis, backward reads the kept exchanged values instead of the local q, k and v.
    inputs = ("q", "k", "v") if "k" in viewed or not schedule.backward else ()
    local = sum(shape.elements(tensor) * shape.itemsize for tensor in inputs)
    if schedule.backward:
        local += 2 * shape.elements("out") * shape.itemsize  # the output and its gradient
        local += sum(map(shape.bytes, STATISTICS))
    given = sum(value_bytes(schedule, shape, name) for name in schedule.given)
    return local + given + workspace(schedule, shape).nbytes + returned_bytes(schedule, shape)


def graphed_peak_bytes(schedules: Sequence[Schedule], shape: Shape) -> int:
    """Return the peak bytes of a layer whose passes are CUDA graphs.

    The sum includes all graphs, because the memory of all graphs exists at the same time. After a replay, results and
    kept values are copied to other memory.
    """
    held = sum(graph_bytes(schedule, shape) for schedule in schedules)
    return held + max(returned_bytes(schedule, shape) for schedule in schedules)
