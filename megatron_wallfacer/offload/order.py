"""Compute the order in which Megatron runs the forward and backward passes of a training step on one pipeline rank.

Copies from host memory are issued before the tensors are needed, so the order of passes must be known in advance.
Megatron defines the order in ``forward_backward_pipelining_without_interleaving`` and ``get_schedule_table`` of
``megatron.core.pipeline_parallel.schedules``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple


class Pass(NamedTuple):
    """A forward or backward pass of one micro-batch through one model chunk. Micro-batches and chunks count from 0."""

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
    """Return the passes of a step in the order in which a rank of the pipeline runs them.

    A step begins with forward passes that fill the pipeline. Then forward and backward passes alternate, and the
    remaining backward passes follow.
    """
    chunks, group, later = pipeline.chunks or 1, pipeline.group or pipeline.size, pipeline.size - pipeline.rank - 1
    table = [
        (chunk, number)
        for start in range(0, micro_batches, group)
        for chunk in range(chunks)
        for number in range(start, min(start + group, micro_batches))
    ]
    forward = [Pass(False, chunk, number) for chunk, number in table]
    backward = [Pass(True, chunks - 1 - chunk, number) for chunk, number in table]
    first = min(later if pipeline.chunks is None else 2 * later + (chunks - 1) * group, len(table))
    steady = chain.from_iterable(zip(forward[first:], backward, strict=False))
    return (*forward[:first], *steady, *backward[len(table) - first :])
