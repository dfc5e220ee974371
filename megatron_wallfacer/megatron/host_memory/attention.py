"""Move kept attention outputs to host memory."""

from __future__ import annotations

from collections.abc import Callable

from megatron_wallfacer.engine.autograd import ForwardResult
from megatron_wallfacer.engine.call import Call
from megatron_wallfacer.offload.queue import OffloadQueue
from megatron_wallfacer.schedule.schedule import forward_schedule
from megatron_wallfacer.schedule.volume import Shape, rows_bytes


def kept_sizes(call: Call, shape: Shape) -> tuple[int, ...]:
    """Return the bytes of each tensor that a forward pass keeps for backward: out, lse, the schedule's kept values."""
    schedule = call.schedule(forward_schedule, shape)
    kept = [schedule.values[name] for name in schedule.keeps]
    return (
        shape.elements("out") * shape.itemsize,
        shape.bytes("lse"),
        *(int(rows_bytes(schedule, shape, value.payload, len(value.chunks))) for value in kept),
    )


def keep_on_host(queue: OffloadQueue, chunk: int, layer: int, finished: ForwardResult) -> Callable[[], ForwardResult]:
    """Store the results of a forward pass in host memory, and return a function that loads the results.

    ``chunk`` is the index of the model chunk, and ``layer`` the index of the layer in the chunk, both from 0.
    """
    stored = queue.store(chunk, layer, (finished.out, finished.lse, *finished.kept))

    def take() -> ForwardResult:
        out, lse, *kept = queue.load(stored)
        return ForwardResult(out, lse, tuple(kept))

    return take
