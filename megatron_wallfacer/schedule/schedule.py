"""The schedule of one rank: the lanes of its head groups, interleaved so that moves hide behind tiles.

The engine runs it, the counters count it, the pictures draw it, and the property tests prove it, so
there is no second description of an algorithm anywhere. Building the schedule of one rank needs no other rank.

The order follows two rules. What somebody waits for is computed first and sent at once. What nobody waits for, own rows
against own rows above all, is computed where something is on its way: at the start, and at the very end.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_wallfacer.schedule.lane import Lane
from megatron_wallfacer.schedule.mask import Pattern
from megatron_wallfacer.schedule.ops import Attend, Expect, Op, Schedule, Start, Value
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.sides import OTHERS, OWN, at, visit_number
from megatron_wallfacer.schedule.sparse import SparseLane, write_sparse
from megatron_wallfacer.schedule.writer import Writer

#: By how many groups of tiles the receives of a move are posted before it starts.
EXPECT_AHEAD = 1


def forward_schedule(
    plan: Plan,
    rank: int,
    *,
    causal: bool = True,
    groups: int = 1,
    q_kept: bool = False,
    pattern: Pattern | None = None,
) -> Schedule:
    """Schedule of the forward pass for one rank.

    Args:
        plan: grid and choices.
        rank: index in the context-parallel group.
        causal: causal mask, else full attention.
        groups: head groups, from :func:`megatron_wallfacer.schedule.heads.head_groups`.
        q_kept: keep the gathered queries for backward.
        pattern: what is live, in place of ``causal``. Where it is sparse nothing hops around the ring
            (:mod:`megatron_wallfacer.schedule.sparse`), except in the published order, which stays as published.
    """
    return _schedule(plan, rank, groups, backward=False, causal=causal, q_kept=q_kept, pattern=pattern)


def backward_schedule(
    plan: Plan,
    rank: int,
    *,
    causal: bool = True,
    groups: int = 1,
    q_kept: bool = False,
    pattern: Pattern | None = None,
) -> Schedule:
    """Schedule of the backward pass for one rank; arguments as in forward."""
    return _schedule(plan, rank, groups, backward=True, causal=causal, q_kept=q_kept, pattern=pattern)


def is_sparse(plan: Plan, pattern: Pattern | None) -> bool:
    """Whether rows are sent straight to those who use them: the pattern leaves much dead, and no order is published."""
    return pattern is not None and pattern.is_sparse and plan.kv_order == "native"


def _schedule(
    plan: Plan, rank: int, groups: int, *, backward: bool, causal: bool, q_kept: bool, pattern: Pattern | None
) -> Schedule:
    program: list[Op] = []
    values: dict[str, Value] = {}
    first = plan.grid.coordinates(rank)["head"] * groups
    sparse = is_sparse(plan, pattern)
    lanes = [
        (SparseLane if sparse else Lane)(
            plan,
            rank,
            Writer(first + group, group, groups, program, values),
            backward=backward,
            causal=causal,
            q_kept=q_kept,
            pattern=pattern,
        )
        for group in range(groups)
    ]
    if sparse:
        write_sparse(lanes)
    else:
        (_with_travelling_results if lanes[0].results(lanes[0].rider) else _with_resting_results)(lanes)
    return Schedule(
        rank=rank,
        cp_size=plan.grid.cp_size,
        parts=plan.grid.head * groups,
        backward=backward,
        values=values,
        ops=_expect_early(program),
        given=tuple(sorted(name for lane in lanes for name in lane.given)),
        keeps=tuple(sorted(name for lane in lanes for name in lane.keeps)),
    )


def _with_resting_results(lanes: Sequence[Lane]) -> None:
    """Nothing travels with the rider: each resident row is complete when all visits are over.

    Own rows meet the home turn before anything else, and the last turn only when others' rows are on their way home.
    """
    one = lanes[0]
    riders = [*one.home_parts, *(at(visit) for visit in range(1, len(one.visits)))]
    early, late = one.home_turn, one.last_turn if OTHERS in one.resident_parts else riders[-1:]
    # With one block only, own against own is all that there is to hide what is sent home.
    starting = lanes[:1] if riders == [OWN] else lanes
    _begin(lanes, starting)
    for index, lane in enumerate(lanes):
        done = early if lane in starting else ()
        for rider in riders:
            lane.arrive(rider)
            own = rider not in (*done, *late)
            if OTHERS in lane.resident_parts and rider == riders[-1]:
                lane.attend_last(rider)
            else:
                lane.attend_resident(rider, own=own)
            if rider == riders[0]:
                _start_next(lanes, index)
        if index:
            lanes[index - 1].finish()
        for rider in late:
            if rider not in done:
                lane.attend(OWN, rider)
    _end(lanes)


def _with_travelling_results(lanes: Sequence[Lane]) -> None:
    """Results travel with the rider: those that go far come first, then the home turn, and own against own last.

    The first lane has nothing to do yet but own rows against the home turn while the first blocks are on their way.
    """
    alone = len(lanes) == 1
    _begin(lanes, lanes[:1], results=True, keep_own=alone and len(lanes[0].home_turn) > 1)
    for index, lane in enumerate(lanes):
        homes, done = lane.home_parts, lane.home_turn if index == 0 else ()
        if OTHERS in homes:
            lane.arrive(OTHERS)
        _travel(lanes, index, done)
        for rider in homes if OWN in homes else ():
            if OTHERS in lane.resident_parts and rider == homes[-1]:
                lane.attend_last(rider)
            elif OTHERS in lane.resident_parts:
                lane.attend_others(rider)
            if rider != OWN:
                lane.attend(OWN, rider)
        if OWN not in homes:
            lane.send_home(lane.resident)
        if index:
            lanes[index - 1].finish()
        if OWN in homes and (index or (alone and len(done) > 1)):
            lane.attend(OWN, OWN)
        if homes != (OWN,):
            lane.take_in(lane.rider, homes[-1])
            lane.send_home(lane.rider)
    _end(lanes)


def _begin(lanes: Sequence[Lane], starting: Sequence[Lane], *, results: bool = False, keep_own: bool = False) -> None:
    """Own rows of the starting lanes against their home turn, while the moves of the first lane are on their way.

    Args:
        lanes: all lanes.
        starting: those that compute now.
        results: send the rider's results of visits that need no others' rows.
        keep_own: leave own against own for later.
    """
    lanes[0].split()
    for index, lane in enumerate(lanes):
        if index == 0:
            lane.start_far()
        lane.start_near()
        if index + 1 < len(lanes):
            lanes[index + 1].split()
        for rider in lane.home_turn if lane in starting else ():
            if not (keep_own and rider == OWN):
                lane.arrive(rider)
                lane.attend(OWN, rider)
            if results and rider != OWN and OTHERS not in lane.resident_parts:
                lane.send_travelled(visit_number(rider))


def _start_next(lanes: Sequence[Lane], index: int) -> None:
    """The moves of the next lane, when this one's first have arrived: sooner they would only delay those."""
    if index + 1 < len(lanes):
        lanes[index + 1].start_far()


def _travel(lanes: Sequence[Lane], index: int, done: Sequence[str]) -> None:
    """All visits that bring results: those from afar, then those of the home turn; ``done`` have met own rows."""
    lane, turn_end = lanes[index], None
    near = () if done and OTHERS not in lane.resident_parts else lane.home_turn[1:]
    # Where the home turn is own rows alone, there is not much to hide the next lane's moves behind: they start now.
    if not near:
        _start_next(lanes, index)
    for rider in (*lane.far_visits, *near):
        lane.arrive(rider)
        lane.attend_resident(rider, own=rider not in done)
        if near and rider == lane.far_visits[0]:
            _start_next(lanes, index)
        if turn_end is not None:
            lane.send_travelled(turn_end)
            turn_end = None
        visit = visit_number(rider)
        if visit == 0 or lane.is_turn_start(visit):
            continue
        lane.send_travelled(visit)
        # What a turn has summed comes to its start; it is waited for one visit later.
        if lane.is_turn_start(visit + 1) or visit + 1 == len(lane.visits):
            turn_end = lane.turn_start(visit)
    if turn_end is not None:
        lane.send_travelled(turn_end)


def _end(lanes: Sequence[Lane]) -> None:
    lanes[-1].finish()
    for lane in lanes:
        lane.store()


def _expect_early(program: Sequence[Op]) -> tuple[Op, ...]:
    """Post the receives of each move some tiles before it starts, so that no message waits for its receiver."""
    tiles = [index for index, op in enumerate(program) if isinstance(op, Attend)]
    expected: dict[int, list[Op]] = {}
    seen = 0
    for op in program:
        seen += isinstance(op, Attend)
        if isinstance(op, Start) and op.move.receives and seen:
            expected.setdefault(tiles[max(0, seen - EXPECT_AHEAD)], []).append(Expect(op.move))
    return tuple(step for index, op in enumerate(program) for step in (*expected.get(index, ()), op))
