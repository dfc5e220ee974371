"""The proof that every schedule is right: all small ones exhaustively, large ones by random samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.ops import Accumulate, Attend, Concat, Op, PostRecv, Schedule, SendRecv, reads, writes
from megatron_wallfacer.schedule.plan import RING_VARIANTS, Plan, RingVariant
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from tests.schedule.cases import all_plans, both_passes, grids, passes, plans
from tests.schedule.machine import check_play
from tests.schedule.proof import (
    Programs,
    accumulators,
    check_balance,
    check_coverage,
    check_kept,
    check_messages,
    check_program,
    check_transfers,
    check_turn,
    holders,
    is_result,
    makes,
    needs,
)

#: The mask decides tiles only, the others almost everything else.
OPTIONS = (
    {"causal": True, "groups": 1, "keep_gathered_q": False},
    {"causal": True, "groups": 2, "keep_gathered_q": True},
    {"causal": False, "groups": 1, "keep_gathered_q": False},
)
SMALL = (*range(1, 9), 12)
#: Beyond this size only some of the plans, with one of the options.
ALL_OF_THEM = 6
builds = pytest.mark.parametrize("backward", [False, True])


@pytest.fixture(scope="module", params=SMALL)
def small(request: pytest.FixtureRequest) -> list[tuple[Programs, Programs]]:
    """Both passes of every plan of one size, with some options."""
    if request.param > ALL_OF_THEM:
        return [both_passes(plan, **OPTIONS[1]) for plan in all_plans(request.param)[:: request.param // 3]]
    return [both_passes(plan, **chosen) for plan in all_plans(request.param) for chosen in OPTIONS]


@pytest.fixture
def each_pass(small: list[tuple[Programs, Programs]]) -> list[Programs]:
    return [programs for both in small for programs in both]


@st.composite
def programs_and_rank(draw: st.DrawFn, **limits: int) -> tuple[Programs, int]:
    """Any pass of any plan of up to 4096 ranks, and one of its ranks."""
    plan = draw(plans(**limits))
    return Programs(plan, **draw(passes)), draw(st.integers(0, plan.grid.cp_size - 1))


# --- all of few ranks ---


def test_small_programs_make_sense(each_pass: list[Programs]) -> None:
    for programs in each_pass:
        for rank in programs.ranks:
            check_program(programs[rank], causal=programs.causal)


def test_small_each_live_pair_is_computed_once(each_pass: list[Programs]) -> None:
    for programs in each_pass:
        check_coverage(programs)


def test_small_every_rank_has_the_same_work(each_pass: list[Programs]) -> None:
    for programs in each_pass:
        check_balance(programs, programs.ranks)


def test_small_every_message_has_its_counterpart(each_pass: list[Programs]) -> None:
    for programs in each_pass:
        for rank in programs.ranks:
            check_transfers(programs, rank)
            check_messages(programs, rank)


def test_small_backward_finds_what_forward_kept(small: list[tuple[Programs, Programs]]) -> None:
    for forward, backward in small:
        for rank in forward.ranks:
            check_kept(forward, backward, rank)


def test_small_no_rank_gets_stuck_and_every_sum_is_complete(each_pass: list[Programs]) -> None:
    for programs in each_pass:
        # The mask decides the tiles of a schedule and nothing else of it.
        if programs.causal:
            check_play(programs)


# --- random ones of up to 4096 ranks ---


@settings(max_examples=50)
@given(programs_and_rank(widest=24, longest_ring=128))
def test_large_programs_make_sense(case: tuple[Programs, int]) -> None:
    programs, rank = case
    check_program(programs[rank], causal=programs.causal)
    check_balance(programs, [rank])
    check_transfers(programs, rank)


@settings(max_examples=30)
@given(programs_and_rank(widest=16, longest_ring=64))
def test_large_every_message_has_its_counterpart(case: tuple[Programs, int]) -> None:
    check_messages(*case, most_peers=2)


@settings(max_examples=50)
@given(programs_and_rank(widest=12, longest_ring=16))
def test_large_resident_rows_meet_everything_once(case: tuple[Programs, int]) -> None:
    check_turn(*case)


@settings(max_examples=40)
@given(plans(widest=24, longest_ring=64), st.integers(1, 3), st.booleans(), st.data())
def test_large_backward_finds_what_forward_kept(
    plan: Plan, groups: int, keep_gathered_q: bool, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, plan.grid.cp_size - 1))
    check_kept(*both_passes(plan, groups=groups, keep_gathered_q=keep_gathered_q), rank)


@settings(max_examples=40)
@given(plans(largest=36), passes)
def test_large_no_rank_gets_stuck_and_every_sum_is_complete(plan: Plan, options: dict) -> None:
    check_play(Programs(plan, **options))


@pytest.mark.parametrize("axis", ["ring_outer", "ring_inner"])
@pytest.mark.parametrize("bidirectional", [False, True])
@builds
def test_long_ring(axis: str, bidirectional: bool, backward: bool) -> None:
    programs = Programs(Plan(Grid(**{axis: 1024}), bidirectional=bidirectional), backward=backward)
    check_program(programs[511], causal=True)
    check_transfers(programs, 511)
    check_messages(programs, 511, most_peers=1)
    check_turn(programs, 511)


@builds
def test_schedule_of_a_large_group_is_cheap(backward: bool) -> None:
    """It is built on every rank before the first step, and knows no other rank's."""
    begun = process_time()
    Programs(Plan(Grid(team=256, ring_outer=256)), backward=backward)[12345]
    assert process_time() - begun < 3


# --- what operations read and write ---


@settings(max_examples=50)
@given(programs_and_rank(largest=64))
def test_reads_and_writes_are_as_defined(case: tuple[Programs, int]) -> None:
    programs, rank = case
    for op in programs[rank].ops:
        assert reads(op) == needs(op)
        assert writes(op) == (
            makes(SendRecv(op.transfer)) if isinstance(op, PostRecv) else (*makes(op), *accumulators(op))
        )


@settings(max_examples=50)
@given(programs_and_rank(largest=64))
def test_transfers_and_attends_are_in_program_order(case: tuple[Programs, int]) -> None:
    schedule = case[0][case[1]]
    assert [op.transfer for op in schedule.ops if isinstance(op, SendRecv)] == list(schedule.transfers)
    assert [op for op in schedule.ops if isinstance(op, Attend)] == list(schedule.attends)


# --- what a schedule says of itself ---


def starts(schedule: Schedule) -> Iterator[tuple[int, SendRecv]]:
    """Transfers, with their places in the program."""
    return ((place, op) for place, op in enumerate(schedule.ops) if isinstance(op, SendRecv))


def places(schedule: Schedule, kind: type[Op]) -> list[int]:
    return [place for place, op in enumerate(schedule.ops) if isinstance(op, kind)]


@builds
def test_single_rank_transfers_nothing(backward: bool) -> None:
    for groups in (1, 3):
        schedule = Programs(Plan(Grid()), backward=backward, groups=groups)[0]
        assert schedule.transfers == ()
        assert len(schedule.attends) == groups


@settings(max_examples=30)
@given(programs_and_rank(largest=128))
def test_schedules_of_equal_plans_are_equal(case: tuple[Programs, int]) -> None:
    programs, rank = case
    again = Programs(
        replace(programs.plan),
        backward=programs.backward,
        causal=programs.causal,
        groups=programs.groups,
        keep_gathered_q=programs.keep_gathered_q,
    )
    assert again[rank] == programs[rank]


@settings(max_examples=50)
@given(plans(largest=64), passes, st.data())
def test_mask_decides_the_tiles_and_nothing_else(plan: Plan, options: dict, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, plan.grid.cp_size - 1))
    causal, full = (Programs(plan, **{**options, "causal": mask})[rank] for mask in (True, False))
    assert without_tiles(causal) == without_tiles(full)


def without_tiles(schedule: Schedule) -> Schedule:
    ops = tuple(replace(op, tiles=()) if isinstance(op, Attend) else op for op in schedule.ops)
    return replace(schedule, ops=ops)


@settings(max_examples=100)
@given(grids(largest=256), st.sampled_from(RING_VARIANTS), st.booleans())
def test_native_order_jumps_only_to_bring_partial_outputs_home(
    grid: Grid, variant: RingVariant, backward: bool
) -> None:
    plan = Plan(grid, forward=variant, backward=variant)
    jumps = [transfer for transfer in Programs(plan, backward=backward)[0].transfers if transfer.axis == "cp"]
    # With pass-Q in forward a partial output is returned directly from the rank that computes it to its origin rank.
    assert {transfer.payload for transfer in jumps} <= (
        {("out", "lse")} if variant == "pass-q" and not backward else set()
    )


# --- what hides behind what ---


@settings(max_examples=80)
@given(plans(largest=128, widest=16), passes, st.data())
def test_first_tiles_of_a_native_schedule_wait_for_nobody(plan: Plan, options: dict, data: st.DataObject) -> None:
    """Own rows against own rows, while everything that can be on its way is: the transfers start before."""
    plan = replace(plan, kv_order="native", grid=replace(plan.grid, head=1))
    if options["backward"] or plan.forward == "pass-q":
        # What travels with results on a double ring leaves own rows for the end, where there is nothing else.
        plan = replace(plan, grid=replace(plan.grid, ring_inner=1))
    rank = data.draw(st.integers(0, plan.grid.cp_size - 1))
    schedule = Programs(plan, **options)[rank]
    first = places(schedule, Attend)[0]
    arriving = {message.value for _, op in starts(schedule) for message in op.transfer.receives}
    assert holders(schedule.values[schedule.attends[0].q[0]].chunks, schedule.cp_size) == {rank}
    assert holders(schedule.values[schedule.attends[0].kv[0]].chunks, schedule.cp_size) == {rank}
    assert not any(arriving.intersection(needs(op)) for op in schedule.ops[: first + 1])
    begun = {op.transfer.axis for place, op in starts(schedule) if place < first}
    # A block that has to come together first goes round a ring only after that.
    together = {axis for axis in ("team", "kv_team") if plan.grid.size_of(axis) > 1}
    if options["backward"] and options["keep_gathered_q"] and plan.backward == "pass-kv":
        together &= begun | {"kv_team"}
    assert together <= begun
    if plan.grid.ring > 1 and not together:
        assert begun


@pytest.mark.parametrize("variant", RING_VARIANTS)
@pytest.mark.parametrize("team", [1, 2])
@builds
def test_outer_hop_is_hidden_behind_a_turn_of_the_inner_ring(variant: RingVariant, team: int, backward: bool) -> None:
    """It starts before the turn's tiles and is waited for after them."""
    grid = Grid(team=team, ring_outer=3, ring_inner=4)
    for schedule in Programs(Plan(grid, forward=variant, backward=variant), backward=backward).by_rank():
        hops = [
            (place, message)
            for place, op in starts(schedule)
            if op.transfer.axis == "ring_outer" and not is_result(op.transfer.payload)
            for message in op.transfer.receives
        ]
        assert hops
        for begun, message in hops:
            waited = next(place for place, op in enumerate(schedule.ops) if message.value in needs(op))
            between = {
                block(op, variant, schedule, grid) for op in schedule.ops[begun:waited] if isinstance(op, Attend)
            }
            turn = (outer_of(message, schedule, grid) + 1) % grid.ring_outer
            visitors = {(turn, inner) for inner in range(grid.ring_inner)}
            here = grid.coordinates(schedule.rank)
            assert visitors - {(here["ring_outer"], here["ring_inner"])} <= between


def block(attend: Attend, variant: RingVariant, schedule: Schedule, grid: Grid) -> tuple[int, int]:
    """Return the coordinates (outer, inner) of the origin rank of the ring operand's rows."""
    name = (attend.kv if variant == "pass-kv" else attend.q)[0]
    here = grid.coordinates(min(holders(schedule.values[name].chunks, schedule.cp_size)))
    return here["ring_outer"], here["ring_inner"]


def outer_of(message, schedule: Schedule, grid: Grid) -> int:
    return grid.coordinates(min(holders(message.chunks, schedule.cp_size)))["ring_outer"]


@pytest.mark.parametrize("team", [2, 4])
@pytest.mark.parametrize("ring", [1, 2, 3])
def test_partial_outputs_go_home_behind_own_tiles(team: int, ring: int) -> None:
    for schedule in Programs(Plan(Grid(team=team, ring_outer=ring))).by_rank():
        last_start = max(place for place, op in starts(schedule) if is_result(op.transfer.payload))
        first_accumulate = places(schedule, Accumulate)[0]
        hiding = [op for op in schedule.ops[last_start:first_accumulate] if isinstance(op, Attend)]
        assert hiding or ring == 1
        assert all(holders(schedule.values[op.q[0]].chunks, schedule.cp_size) == {schedule.rank} for op in hiding)


@builds
def test_head_groups_are_pipelined(backward: bool) -> None:
    """The exchange of the second group is on its way before the tiles of the first begin."""
    schedule = Programs(Plan(Grid(head=4)), backward=backward, groups=2)[1]
    splits = [place for place, op in starts(schedule) if not is_result(op.transfer.payload)]
    assert {schedule.values[schedule.ops[place].transfer.sends[0].value].head_slice % 2 for place in splits} == {0, 1}
    assert max(splits) < places(schedule, Attend)[0]
    first_join = min(place for place, op in starts(schedule) if is_result(op.transfer.payload))
    assert first_join < places(schedule, Attend)[-1]


@settings(max_examples=100)
@given(programs_and_rank(largest=128, widest=16))
def test_receives_of_transfers_after_tiles_are_posted_before(case: tuple[Programs, int]) -> None:
    schedule = case[0][case[1]]
    first = places(schedule, Attend)[0]
    expected = [op.transfer for op in schedule.ops if isinstance(op, PostRecv)]
    assert sorted(map(repr, expected)) == sorted(
        repr(op.transfer) for place, op in starts(schedule) if place > first and op.transfer.receives
    )


# --- how much transfers ---


@settings(max_examples=80)
@given(plans(largest=256, widest=8), passes, st.data())
def test_ring_operand_and_its_gradient_hop_to_every_other_place_of_the_ring(
    plan: Plan, options: dict, data: st.DataObject
) -> None:
    """A block needs ring - 1 hops to be everywhere; its gradient, or its partial outputs, as many to be home."""
    rank = data.draw(st.integers(0, plan.grid.cp_size - 1))
    programs = Programs(plan, **options)
    ring_operand = plan.ring_operand(backward=programs.backward)
    tensors = {"kv": [("k", "v")], "q": [("q",), ("dout", "lse", "delta")][: 1 + programs.backward]}[ring_operand]
    results = {"kv": [("dk", "dv")], "q": [("dq",)]}[ring_operand] if programs.backward else []
    for payload in tensors + results:
        assert hops(programs[rank], payload) == (plan.grid.ring - 1) * programs.groups
    if ring_operand == "q" and not programs.backward:
        jumps = [
            transfer
            for transfer in programs[rank].transfers
            if transfer.axis == "cp" and transfer.payload == ("out", "lse")
        ]
        assert len(jumps) >= (plan.grid.ring - 1) * programs.groups


def hops(schedule: Schedule, payload: tuple[str, ...]) -> int:
    transfers = [m for m in schedule.transfers if m.axis in ("ring_outer", "ring_inner") and m.payload == payload]
    assert all(len(transfer.sends) == len(transfer.receives) == 1 for transfer in transfers)
    return len(transfers)


@settings(max_examples=100)
@given(plans(largest=128, widest=16), passes, st.data())
def test_queries_that_were_kept_are_not_gathered_again(plan: Plan, options: dict, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, plan.grid.cp_size - 1))
    schedule = Programs(plan, **{**options, "backward": True, "keep_gathered_q": True})[rank]
    if plan.forward == plan.backward == "pass-kv":
        assert not [
            transfer for transfer in schedule.transfers if transfer.axis == "team" and transfer.payload == ("q",)
        ]


@pytest.mark.parametrize("groups", [1, 2])
def test_exchanged_heads_are_kept_for_backward(groups: int) -> None:
    forward, backward = both_passes(Plan(Grid(head=4, ring_outer=2)), groups=groups)
    exchanged = {
        mode: {
            transfer.payload
            for transfer in programs[3].transfers
            if transfer.axis == "head" and not is_result(transfer.payload)
        }
        for mode, programs in (("forward", forward), ("backward", backward))
    }
    assert exchanged == {"forward": {("q",), ("k", "v")}, "backward": {("dout", "lse", "delta")}}


def test_blocks_go_both_ways_round() -> None:
    programs = Programs(Plan(Grid(ring_outer=7), bidirectional=True))
    for rank in programs.ranks:
        to = [message.peer for transfer in programs[rank].transfers for message in transfer.sends]
        assert sorted(to) == sorted([(rank + 1) % 7, (rank - 1) % 7] * 3)


def test_nothing_is_concatenated_where_nothing_is_divided() -> None:
    """A plain ring reads what it was sent as it came."""
    for build in (forward_schedule, backward_schedule):
        assert not places(build(Plan(Grid(ring_outer=4)), 1), Concat)
