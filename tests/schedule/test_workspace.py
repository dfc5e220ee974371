"""Offsets in a workspace: buffers that are alive together never overlap, and little is wasted."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.lifetimes import lifetimes
from megatron_wallfacer.schedule.memory import kept_buffers, workspace
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import SCHEMES, make_plan
from megatron_wallfacer.schedule.volume import Shape, rows_bytes
from megatron_wallfacer.schedule.workspace import ALIGNMENT, Buffer, WorkspaceLayout, aligned, arrange

#: Size of the workspace over the bytes alive at once, of any scheme.
WASTE = 1.15


def check(buffers: list[Buffer], found: WorkspaceLayout) -> None:
    assert found.offsets.keys() == {buffer.key for buffer in buffers}
    assert all(offset % ALIGNMENT == 0 for offset in found.offsets.values())
    assert all(found.offsets[buffer.key] + buffer.nbytes <= found.nbytes for buffer in buffers)
    for a, b in combinations(buffers, 2):
        if a.first <= b.last and b.first <= a.last:
            low, high = sorted((a, b), key=lambda one: found.offsets[one.key])
            assert found.offsets[low.key] + low.nbytes <= found.offsets[high.key], (a, b)


def alive_at_once(buffers: list[Buffer]) -> int:
    change: Counter[int] = Counter()
    for buffer in buffers:
        change[buffer.first] += aligned(buffer.nbytes)
        change[buffer.last + 1] -= aligned(buffer.nbytes)
    held = most = 0
    for step in sorted(change):
        held += change[step]
        most = max(most, held)
    return most


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8), st.integers(1, 2000)), max_size=20))
def test_buffers_that_are_alive_together_never_overlap(found: list[tuple[int, int, int]]) -> None:
    buffers = [Buffer(key, first, first + length, size) for key, (first, length, size) in enumerate(found)]
    placement = arrange(buffers)
    check(buffers, placement)
    assert placement.nbytes >= alive_at_once(buffers)


def test_a_buffer_takes_the_place_of_one_that_is_gone() -> None:
    buffers = [Buffer("a", 0, 1, 256), Buffer("b", 2, 3, 256), Buffer("c", 0, 3, 128)]
    assert arrange(buffers).nbytes == 256 + 128


def test_overlap_would_be_seen() -> None:
    buffers = [Buffer("a", 0, 2, 256), Buffer("b", 2, 3, 256)]
    with pytest.raises(AssertionError):
        check(buffers, WorkspaceLayout({"a": 0, "b": 128}, 512))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cp_size", [2, 8, 64])
def test_every_scheme(scheme: str, cp_size: int) -> None:
    plan = make_plan(scheme, cp_size, q_heads=64, kv_heads=64)
    shape = Shape(tokens=512, q_heads=64, kv_heads=64, head_dim=64)
    for build in (forward_schedule, backward_schedule):
        schedule = build(plan, busiest_rank(plan), groups=head_groups(plan, 64, 64))
        kept = kept_buffers(schedule)
        buffers = [
            Buffer(life.key, life.first, life.last, int(rows_bytes(schedule, shape, life.payload, life.chunks)))
            for life in lifetimes(schedule)
            if life.key not in kept
        ]
        placement = workspace(schedule, shape)
        check(buffers, placement)
        assert placement.nbytes <= WASTE * alive_at_once(buffers)
