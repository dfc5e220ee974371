"""The order of a step's passes is Megatron's. Training on gloo ranks compares it with every layer that runs
(`tests/megatron/test_host_memory.py`)."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_wallfacer.offload.order import Pass, Pipeline, passes_of_step


def written(pipeline: Pipeline, micro_batches: int) -> str:
    """Passes as in Megatron's docs: F and B, the chunk, the micro-batch."""
    return " ".join(
        f"{'B' if one.backward else 'F'}{one.chunk}{one.micro_batch}" for one in passes_of_step(pipeline, micro_batches)
    )


def test_without_a_pipeline_each_micro_batch_is_whole() -> None:
    assert written(Pipeline(), 3) == "F00 B00 F01 B01 F02 B02"


def test_one_forward_one_backward() -> None:
    assert written(Pipeline(3, 0), 4) == "F00 F01 F02 B00 F03 B01 B02 B03"
    assert written(Pipeline(3, 2), 4) == "F00 B00 F01 B01 F02 B02 F03 B03"


def test_interleaved_stages() -> None:
    assert written(Pipeline(2, 0, 2), 4) == "F00 F01 F10 F11 F02 B10 F03 B11 F12 B00 F13 B01 B12 B13 B02 B03"
    assert written(Pipeline(2, 1, 2), 4) == "F00 F01 F10 B10 F11 B11 F02 B00 F03 B01 F12 B12 F13 B13 B02 B03"
    # Fewer micro-batches than the warm-up has: all forward passes come first.
    assert written(Pipeline(2, 0, 2), 2) == "F00 F01 F10 F11 B10 B11 B00 B01"


@pytest.mark.parametrize("pipeline", [Pipeline(4, 1), Pipeline(4, 1, 3), Pipeline(2, 0, 2, 3), Pipeline(2, 1, 1)])
@pytest.mark.parametrize("micro_batches", [1, 4, 7])
def test_every_pass_is_there_once_and_backward_comes_later(pipeline: Pipeline, micro_batches: int) -> None:
    passes = passes_of_step(pipeline, micro_batches)
    chunks = range(pipeline.chunks or 1)
    every = [Pass(back, chunk, n) for back in (False, True) for chunk in chunks for n in range(micro_batches)]
    assert Counter(passes) == Counter(every)
    for one in passes:
        if one.backward:
            assert passes.index(one._replace(backward=False)) < passes.index(one)
