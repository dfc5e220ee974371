"""Many short documents: the calls of a mask are those of the definition, in time that is linear in the documents."""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.batches import batches, joined_calls
from megatron_wallfacer.schedule.calls import Segment, call_of
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.lower import lower
from megatron_wallfacer.schedule.mask import Mask, chunk_mask_of
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.program import AttendBackward, AttendForward
from megatron_wallfacer.schedule.rows import contiguous
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape
from tests.schedule.test_batches import same
from tests.schedule.test_mask import layouts

TOKENS, DOCUMENTS, CP_SIZE = 1 << 20, 65536, 8
SIZE = TOKENS // (2 * CP_SIZE)
#: Seconds of one thread for the calls, and for all host work on a batch.
CALLS_LIMIT, LIMIT = 0.2, 0.5


def all_segments(mask: Mask, chunks: Sequence[int], cp_size: int, size: int) -> list[Segment]:
    """Segments of a block: every document is compared with every chunk."""
    found = []
    for index, chunk in enumerate(chunks):
        row, first = index * size, chunk * size
        for document, (start, stop) in enumerate(pairwise(mask.documents or (0, 2 * cp_size * size))):
            if mask.is_per_document:
                piece = (stop - start) // (2 * cp_size)
                found.append(Segment(document, chunk * piece, row, piece))
                row += piece
            elif max(first, start) < min(first + size, stop):
                low = max(first, start)
                found.append(Segment(document, low - start, row + low - first, min(first + size, stop) - low))
    return found


def compared_calls(
    mask: Mask, q_chunks: Sequence[int], k_chunks: Sequence[int], cp_size: int, size: int
) -> tuple[AttnTile, ...]:
    """Calls of a mask: every segment of rows is compared with every segment of columns."""
    rows, cols = (all_segments(mask, chunks, cp_size, size) for chunks in (q_chunks, k_chunks))
    calls = (call_of(mask, q, k) for q in rows for k in cols if q.document == k.document)
    return tuple(call for call in calls if call is not None)


@given(layouts(), st.data())
def test_calls_are_those_of_all_comparisons(layout: tuple[Mask, int, int], data: st.DataObject) -> None:
    mask, cp_size, size = layout
    chunks = st.lists(st.integers(0, 2 * cp_size - 1), min_size=1, unique=True)
    q_chunks, k_chunks = data.draw(chunks), data.draw(chunks)
    expected = compared_calls(mask, q_chunks, k_chunks, cp_size, size)
    assert mask.calls(q_chunks, k_chunks, cp_size, size) == expected
    joined = joined_calls(mask, q_chunks, k_chunks, cp_size, size)
    assert sorted(map(same, joined), key=_order) == sorted(map(same, batches(expected)), key=_order)


def _order(call: AttnTile) -> tuple[object, ...]:
    return call.rows, call.cols


def measured[Result](work: Callable[[], Result]) -> tuple[Result, float]:
    """The result, and seconds of this thread: the least of three runs without the garbage collector."""
    seconds = []
    gc.disable()
    try:
        for _ in range(3):
            start = time.thread_time()
            result = work()
            seconds.append(time.thread_time() - start)
    finally:
        gc.enable()
    return result, min(seconds)


def documents(shard_mode: str) -> tuple[int, ...]:
    """65,536 documents in 1M tokens: of random lengths, or where they are cut the shortest possible, 2P tokens."""
    if shard_mode == "per_document":
        return tuple(range(0, TOKENS + 1, 2 * CP_SIZE))
    return (0, *sorted(random.Random(0).sample(range(1, TOKENS), DOCUMENTS - 1)), TOKENS)


@pytest.mark.alone
@pytest.mark.parametrize("shard_mode", ["sequence", "per_document"])
def test_calls_of_65536_documents_take_a_fifth_of_a_second(shard_mode: str) -> None:
    mask = Mask(documents=documents(shard_mode), shard_mode=shard_mode)
    chunks = range(2 * CP_SIZE) if shard_mode == "sequence" else (3,)
    calls, seconds = measured(lambda: mask.calls(chunks, chunks, CP_SIZE, SIZE))
    assert len(calls) >= DOCUMENTS
    assert seconds < CALLS_LIMIT


@pytest.mark.alone
@pytest.mark.parametrize("shard_mode", ["sequence", "per_document"])
@pytest.mark.parametrize("grid", [Grid(ring_outer=CP_SIZE), Grid(team=2, ring_outer=CP_SIZE // 2)], ids=str)
def test_host_work_on_65536_documents_takes_half_a_second(shard_mode: str, grid: Grid) -> None:
    """Of one rank, forward and backward: mask, pattern, tiles, schedule, lowering."""
    boundaries, shape = documents(shard_mode), _shape()

    def work() -> list[int]:
        mask = Mask(documents=boundaries, shard_mode=shard_mode)
        mask.check(CP_SIZE, TOKENS)
        return [_attends(_pass(mask, grid, build), mask, shape) for build in (forward_schedule, backward_schedule)]

    attends, seconds = measured(work)
    # A call for each pair of chunks, not for each document.
    assert all(2 <= number <= 4 * 4 * CP_SIZE for number in attends)
    assert seconds < LIMIT


def test_a_call_per_document_is_lowered_in_few_operations() -> None:
    """For a kernel that takes one document in a call: 8,030 calls in each pass.

    A function call takes about 0.2 us here, so 150 for each kernel call are half a second for both passes.
    """
    mask, shape, grid = Mask(documents=documents("sequence")), _shape(), Grid(ring_outer=CP_SIZE)
    operations = kernel_calls = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal operations
        operations += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        programs = [
            lower(schedule := _pass(mask, grid, build), shape, mask, _strides(schedule, shape), varlen=False)
            for build in (forward_schedule, backward_schedule)
        ]
    finally:
        sys.setprofile(None)
    for program in programs:
        kernel_calls += sum(isinstance(s, AttendForward | AttendBackward) for _, steps in program.steps for s in steps)
    assert 2 * DOCUMENTS // CP_SIZE * 0.9 < kernel_calls < 2 * DOCUMENTS // CP_SIZE * 1.1
    assert operations / kernel_calls < 150


def _pass(mask: Mask, grid: Grid, build: Callable[..., Schedule]) -> Schedule:
    return build(Plan(grid), CP_SIZE - 1, chunk_mask=chunk_mask_of(mask, CP_SIZE, SIZE))


def _attends(schedule: Schedule, mask: Mask, shape: Shape) -> int:
    """Number of kernel calls of a pass, lowered for a kernel that takes several documents in one call."""
    program = lower(schedule, shape, mask, _strides(schedule, shape), varlen=True)
    return sum(isinstance(step, AttendForward | AttendBackward) for _, steps in program.steps for step in steps)


def _shape() -> Shape:
    return Shape(
        tokens=TOKENS // CP_SIZE, q_heads=8, kv_heads=2, head_dim=128, v_head_dim=128, batch=1, itemsize=2,
        accumulate_itemsize=4,
    )  # fmt: skip


def _strides(schedule: Schedule, shape: Shape) -> dict[str, tuple[int, ...]]:
    names = ("dout", "out", "lse", "delta", "q", "k", "v") if schedule.backward else ("q", "k", "v")
    rows = {name: (shape.tokens, 1, shape.kv_heads if name in "kv" else shape.q_heads) for name in names}
    return {name: contiguous(rows[name] if name in ("lse", "delta") else (*rows[name], 128)) for name in names}
