"""Compute the order in which Megatron runs the forward and backward passes of a training step on one pipeline rank.

Copies from host memory are issued before the tensors are needed, so the order of passes must be known in advance. The
source of the order is ``forward_backward_pipelining_without_interleaving`` and ``get_schedule_table`` in
``megatron.core.pipeline_parallel.schedules``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Pass(NamedTuple):
    """A forward or backward pass of one micro-batch through one model chunk.

    Attributes:
        backward: whether the pass is a backward pass.
        chunk: number of the model chunk on its rank from 0.
        micro_batch: number of the micro-batch in the step from 0.
    """

    backward: bool
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Pipeline:
    """Position of a rank in pipeline parallelism.

    Attributes:
        size: pipeline-parallel size.
        rank: pipeline-parallel rank.
        chunks: number of model chunks per rank, or None without interleaved stages.
        group: number of consecutive micro-batches that run through a chunk before the next chunk
            (``--microbatch-group-size-per-virtual-pipeline-stage``), or None for the pipeline-parallel size.
    """

    size: int = 1
    rank: int = 0
    chunks: int | None = None
    group: int | None = None


def passes_of_step(pipeline: Pipeline, micro_batches: int) -> tuple[Pass, ...]:
    """Return the passes of a step in the order in which a rank of the pipeline runs them."""
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
    """Return (chunk, micro-batch) of each forward pass."""
    starts = range(0, micro_batches, group)
    return [
        (chunk, number)
        for start in starts
        for chunk in range(chunks)
        for number in range(start, min(start + group, micro_batches))
    ]


def _one_forward_one_backward(forward: Sequence[Pass], backward: Sequence[Pass], first: int) -> tuple[Pass, ...]:
    """Return ``first`` forward passes, then forward and backward passes alternately, then the other backward passes."""
    pairs = zip(forward[first:], backward, strict=False)
    steady = [done for pair in pairs for done in pair]
    return (*forward[:first], *steady, *backward[len(forward) - first :])
