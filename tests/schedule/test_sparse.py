"""Schedules of masks that leave much dead: right by the same proof as all others, and nothing transfers in vain."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.mask import ChunkMask, Mask, chunk_mask_of
from megatron_wallfacer.schedule.ops import Attend, SendRecv
from megatron_wallfacer.schedule.plan import RING_VARIANTS, Plan, RingVariant
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape, messages, received_elements
from tests.schedule.cases import both_passes, plans
from tests.schedule.machine import check_play
from tests.schedule.proof import (
    Broken,
    Programs,
    check_coverage,
    check_kept,
    check_messages,
    check_program,
    check_transfers,
)


def check_all(plan: Plan, chunk_mask: ChunkMask, groups: int = 1, keep_gathered_q: bool = False) -> None:
    """Everything that is proved of a schedule."""
    forward, backward = both_passes(plan, causal=chunk_mask, groups=groups, keep_gathered_q=keep_gathered_q)
    for programs in (forward, backward):
        for rank in programs.ranks:
            check_program(programs[rank], causal=chunk_mask)
            check_transfers(programs, rank)
            check_messages(programs, rank)
        check_coverage(programs)
        check_play(programs)
    for rank in forward.ranks:
        check_kept(forward, backward, rank)


@st.composite
def masks(draw: st.DrawFn, tokens: int) -> Mask:
    """Windows and documents of a sequence."""
    left, right = draw(st.none() | st.integers(0, tokens)), draw(st.sampled_from((0, 0, None, 1, 5)))
    inner = draw(st.none() | st.sets(st.integers(1, tokens), min_size=1, max_size=6))
    return Mask(left, right, None if inner is None else tuple(sorted({0, *inner})))


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(plans(largest=24, widest=8), st.integers(1, 3), st.integers(1, 2), st.booleans(), st.data())
def test_proof(plan: Plan, size: int, groups: int, keep_gathered_q: bool, data: st.DataObject) -> None:
    cp_size = plan.grid.cp_size
    mask = data.draw(masks(2 * cp_size * size)) if cp_size * size > 1 else Mask(left=1)
    chunk_mask = chunk_mask_of(mask, cp_size, size)
    assume(chunk_mask is not None)
    check_all(plan, chunk_mask, groups, keep_gathered_q)


GRIDS = {
    "ring": Grid(ring_outer=8),
    "team-ring": Grid(team=2, ring_outer=4),
    "double ring": Grid(ring_outer=4, ring_inner=2),
    "mesh": Grid(team=2, kv_team=4),
    "head": Grid(head=2, ring_outer=4),
    "all": Grid(2, 2, 2, 2, 2),
}


@pytest.mark.parametrize(("name", "variant"), product(GRIDS, RING_VARIANTS))
def test_a_window_of_one_chunk_costs_one_shard_whatever_the_number_of_ranks(name: str, variant: RingVariant) -> None:
    """Each chunk sees itself and the one before it. On a ring alone that is what is received: two chunks of K and V."""
    grid = GRIDS[name]
    plan, chunk_mask = (
        Plan(grid, forward=variant, backward=variant),
        chunk_mask_of(Mask(left=4), grid.cp_size, 4),
    )
    check_all(plan, chunk_mask)
    if name == "ring" and variant == "pass-kv":
        shape = Shape(tokens=8, q_heads=1, kv_heads=1, head_dim=1)
        for rank in range(1, 7):
            assert received_elements(forward_schedule(plan, rank, chunk_mask=chunk_mask), shape) == 2 * 8
        # The first chunk needs none, and its rank's other chunk is the last.
        assert received_elements(forward_schedule(plan, 0, chunk_mask=chunk_mask), shape) == 8


def test_words_fall_with_the_window() -> None:
    shape, cp_size = Shape(tokens=16, q_heads=8, kv_heads=8, head_dim=4), 16
    plan, found = make_plan("team-ring", cp_size, q_heads=8, kv_heads=8), []
    for left in (7, 31, 63, 127, None):
        chunk_mask = chunk_mask_of(Mask(left=left), cp_size, 8)
        passes = (forward_schedule, backward_schedule)
        found.append(
            sum(
                received_elements(build(plan, rank, chunk_mask=chunk_mask), shape)
                for build in passes
                for rank in range(cp_size)
            )
        )
    assert found == sorted(found)
    assert found[0] < 0.5 * found[-1]


def test_documents_that_stay_on_a_rank_cost_nothing() -> None:
    """Chunks are documents: there is nothing to tell anybody."""
    chunk_mask = chunk_mask_of(Mask(documents=tuple(range(0, 33, 2))), 8, 2)
    for build, rank in product((forward_schedule, backward_schedule), range(8)):
        schedule = build(Plan(GRIDS["ring"]), rank, chunk_mask=chunk_mask)
        assert messages(schedule) == 0
        assert len(schedule.attends) == 1


def test_only_what_is_used_is_sent() -> None:
    """Every row that arrives is read by a tile."""
    plan, chunk_mask = Plan(GRIDS["all"]), chunk_mask_of(Mask(left=9, documents=(0, 30, 41, 97, 128)), 32, 2)
    for rank in range(32):
        schedule = forward_schedule(plan, rank, chunk_mask=chunk_mask)
        used = {("q", chunk) for attend in schedule.attends for chunk in _rows(schedule, attend, "q")}
        used |= {("kv", chunk) for attend in schedule.attends for chunk in _rows(schedule, attend, "kv")}
        for transfer in schedule.transfers:
            if transfer.axis != "head" and transfer.channel[1] == "inputs":
                side = "q" if transfer.payload == ("q",) else "kv"
                assert {(side, chunk) for message in transfer.receives for chunk in message.chunks} <= used


def _rows(schedule: object, attend: Attend, side: str) -> set[int]:
    chunks = schedule.values[getattr(attend, side)[0]].chunks
    ranges = (tile.rows if side == "q" else tile.cols for tile in attend.tiles)
    return {chunk for some in ranges for chunk in chunks[slice(*some)]}


def test_the_published_order_stays_as_published() -> None:
    plan = make_plan("wallfacer", 8, team_size=2)
    chunk_mask = chunk_mask_of(Mask(left=3), 8, 4)
    check_all(plan, chunk_mask)
    transfers = [
        schedule.transfers for schedule in (forward_schedule(plan, 3), forward_schedule(plan, 3, chunk_mask=chunk_mask))
    ]
    assert transfers[0] == transfers[1]


# --- the checks fail when they should ---

BROKEN = Programs(
    Plan(GRIDS["team-ring"]), backward=True, causal=chunk_mask_of(Mask(left=5, documents=(0, 19, 64)), 8, 4)
)


def test_a_dead_tile_is_seen() -> None:
    rank, ops = 3, list(BROKEN[3].ops)
    index = next(index for index, op in enumerate(ops) if isinstance(op, Attend))
    tile = ops[index].tiles[0]
    ops[index] = replace(ops[index], tiles=(replace(tile, partial=False),))
    with pytest.raises(Broken, match="sees keys that it must not"):
        check_program(replace(BROKEN[rank], ops=tuple(ops)), causal=BROKEN.causal)


def test_a_row_that_is_not_sent_is_seen() -> None:
    programs = Programs(BROKEN.plan, backward=True, causal=BROKEN.causal)
    ops = list(programs[2].ops)
    index = next(index for index, op in enumerate(ops) if isinstance(op, SendRecv) and op.transfer.sends)
    ops[index] = SendRecv(replace(ops[index].transfer, sends=ops[index].transfer.sends[1:]))
    programs[2] = replace(programs[2], ops=tuple(ops))
    peer = next(message.peer for message in BROKEN[2].ops[index].transfer.sends[:1])
    with pytest.raises(Broken, match="expected"):
        check_messages(programs, peer)
    with pytest.raises(Broken):
        check_play(programs)
