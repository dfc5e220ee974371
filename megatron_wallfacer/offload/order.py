"""The forward and backward passes of one training step on one pipeline rank, in Megatron's order.

Copies from host memory are issued before they are needed, so the order must be known. Source of both schedules:
``forward_backward_pipelining_without_interleaving`` and ``get_schedule_table`` of
``megatron.core.pipeline_parallel.schedules``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Pass(NamedTuple):
    """A forward or backward pass of one micro-batch through one model chunk.

    Attributes:
        backward: whether it is the backward pass.
        chunk: number of the model chunk on its rank, from 0.
        micro_batch: number of the micro-batch in the step, from 0.
    """

    backward: bool
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Pipeline:
    """The place of a rank in pipeline parallelism.

    Attributes:
        size: pipeline-parallel size.
        rank: pipeline-parallel rank.
        chunks: model chunks per rank, for interleaved stages; None without them.
        group: consecutive micro-batches that run through a chunk before the next chunk's turn
            (``--microbatch-group-size-per-virtual-pipeline-stage``); the pipeline-parallel size if None.
    """

    size: int = 1
    rank: int = 0
    chunks: int | None = None
    group: int | None = None


def passes_of_step(pipeline: Pipeline, micro_batches: int) -> tuple[Pass, ...]:
    """Return the passes of a step in the order in which the rank runs them.

    Args:
        pipeline: place of the rank.
        micro_batches: micro-batches of the step.
    """
    if pipeline.chunks is None:
        forward = [Pass(False, 0, number) for number in range(micro_batches)]
        backward = [Pass(True, 0, number) for number in range(micro_batches)]
        first = pipeline.size - pipeline.rank - 1
    else:
        group = pipeline.group or pipeline.size
        table = _interleaved(micro_batches, pipeline.chunks, group)
        forward = [Pass(False, chunk, number) for chunk, number in table]
        backward = [Pass(True, pipeline.chunks - 1 - chunk, number) for chunk, number in table]
        first = 2 * (pipeline.size - pipeline.rank - 1) + (pipeline.chunks - 1) * group
    return _one_forward_one_backward(forward, backward, min(first, len(forward)))


def _interleaved(micro_batches: int, chunks: int, group: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) of each forward pass."""
    starts = range(0, micro_batches, group)
    return [
        (chunk, number)
        for start in starts
        for chunk in range(chunks)
        for number in range(start, min(start + group, micro_batches))
    ]


def _one_forward_one_backward(forward: Sequence[Pass], backward: Sequence[Pass], first: int) -> tuple[Pass, ...]:
    """Join both lists: ``first`` forward passes, then one of each in turn, then the other backward passes."""
    pairs = zip(forward[first:], backward, strict=False)
    steady = [done for pair in pairs for done in pair]
    return (*forward[:first], *steady, *backward[len(forward) - first :])
