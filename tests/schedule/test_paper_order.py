"""The paper's arrangement as published (Algorithms 2 and 3): who sends what to whom, and who meets whom when."""

from __future__ import annotations

from itertools import groupby

import pytest

from megatron_wallfacer.schedule.grid import RINGS_ADJACENT
from megatron_wallfacer.schedule.ops import Schedule
from tests.schedule.cases import PUBLISHED, both_passes, published
from tests.schedule.proof import Programs, holders, is_result

sizes = pytest.mark.parametrize(("cp_size", "team"), PUBLISHED)
orders = pytest.mark.parametrize("order", ["paper", "permuted"])
Teams = list[tuple[int, ...]]


def get_init_send(rank: int, cp_size: int, team: int) -> int:
    """Algorithm 2, line by line, for teams of neighbouring ranks."""
    d_t, d_a = cp_size // team, team
    r_t, r_a = divmod(rank, d_a)
    gs = d_t // d_a
    target_team = r_a * gs + r_t // d_a
    target_member = r_t % d_a
    return target_team * d_a + target_member


def get_p2p(rank: int, cp_size: int, team: int) -> tuple[int, int]:
    """Algorithm 3, line by line: (next, last)."""
    d_t, d_a = cp_size // team, team
    r_t, r_a = divmod(rank, d_a)
    gs = d_t // d_a
    g = r_t // gs
    next_team = (r_t + 1) % gs + gs * g
    last_team = (r_t - 1) % gs + gs * g
    return next_team * d_a + r_a, last_team * d_a + r_a


def teams_met(rank: int, cp_size: int, team: int) -> Teams:
    """Whose block a rank has at each turn: permuted once by Algorithm 2, then handed on by Algorithm 3."""
    starts_at = {get_init_send(r, cp_size, team): r for r in range(cp_size)}
    found = []
    for _ in range(cp_size // team**2):
        first = starts_at[rank] // team * team
        found.append(tuple(range(first, first + team)))
        # What the next turn brings is what the last rank of the ring has now.
        rank = get_p2p(rank, cp_size, team)[1]
    return found


def ring_operands(schedule: Schedule, side: str) -> Teams:
    """The ranks whose rows of a side are attended to, visit by visit."""
    blocks = [schedule.values[(attend.kv if side == "kv" else attend.q)[0]].chunks for attend in schedule.attends]
    return [tuple(sorted(holders(chunks, schedule.cp_size))) for chunks, _ in groupby(blocks)]


def residents(schedule: Schedule, side: str) -> set[int]:
    names = {(attend.kv if side == "kv" else attend.q)[0] for attend in schedule.attends}
    return {rank for name in names for rank in holders(schedule.values[name].chunks, schedule.cp_size)}


def peers(schedule: Schedule, axis: str) -> list[tuple[int, int]]:
    """(to, from) of every transfer of inputs over an axis."""
    transfers = [
        transfer for transfer in schedule.transfers if transfer.axis == axis and not is_result(transfer.payload)
    ]
    return [(send.peer, receive.peer) for m in transfers for send, receive in zip(m.sends, m.receives, strict=True)]


def passes(cp_size: int, team: int, order: str = "paper") -> list[tuple[str, Programs]]:
    """Both passes, with their ring operand: keys and values in forward, queries in backward."""
    return list(zip(("kv", "q"), both_passes(published(cp_size, team, order=order)), strict=True))


@sizes
@orders
def test_blocks_that_a_rank_meets_are_those_of_the_paper(cp_size: int, team: int, order: str) -> None:
    for ring_operand, programs in passes(cp_size, team, order):
        for rank in programs.ranks:
            assert ring_operands(programs[rank], ring_operand) == teams_met(rank, cp_size, team)


@sizes
@orders
def test_other_side_of_every_tile_is_the_rank_s_own_team(cp_size: int, team: int, order: str) -> None:
    for ring_operand, programs in passes(cp_size, team, order):
        for rank in programs.ranks:
            first = rank // team * team
            assert residents(programs[rank], "q" if ring_operand == "kv" else "kv") == set(range(first, first + team))


@sizes
@orders
def test_permutation_is_algorithm_2(cp_size: int, team: int, order: str) -> None:
    receive_from = {get_init_send(rank, cp_size, team): rank for rank in range(cp_size)}
    for ring_operand, programs in passes(cp_size, team, order):
        for rank in programs.ranks:
            there = (get_init_send(rank, cp_size, team), receive_from[rank])
            # In backward dO and what goes with it follow the queries.
            bundles = {"kv": 1, "q": 2}[ring_operand]
            assert peers(programs[rank], "cp") == ([there] * bundles if there[0] != rank else [])


@sizes
def test_ring_hops_are_algorithm_3(cp_size: int, team: int) -> None:
    for ring_operand, programs in passes(cp_size, team):
        for rank in programs.ranks:
            hops = peers(programs[rank], "ring_outer")
            assert hops == [get_p2p(rank, cp_size, team)] * ({"kv": 1, "q": 2}[ring_operand] * (cp_size // team**2 - 1))


@sizes
def test_gradients_leave_by_the_way_the_queries_came(cp_size: int, team: int) -> None:
    programs = both_passes(published(cp_size, team))[1]
    came_from = {get_init_send(rank, cp_size, team): rank for rank in range(cp_size)}
    for rank in programs.ranks:
        exits = (one for one in programs[rank].transfers if one.axis == "cp" and one.payload == ("dq",))
        home = [message.peer for one in exits for message in one.sends]
        assert home == ([came_from[rank]] if came_from[rank] != rank else [])


@sizes
def test_whole_blocks_are_permuted_or_single_shards(cp_size: int, team: int) -> None:
    for order, shards in (("paper", team), ("permuted", 1)):
        schedule = both_passes(published(cp_size, team, order=order))[0][1]
        sizes = {len(m.chunks) for transfer in schedule.transfers if transfer.axis == "cp" for m in transfer.sends}
        assert sizes == {2 * shards}


def test_paper_figure_of_eight_ranks_in_teams_of_two() -> None:
    programs = both_passes(published(8, 2))[0]
    permuted = [peers(programs[rank], "cp") or [(rank, rank)] for rank in range(8)]
    assert [there[0][0] for there in permuted] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert [peers(programs[rank], "ring_outer")[0][0] for rank in range(8)] == [2, 3, 0, 1, 6, 7, 4, 5]


def test_rings_adjacent_placement_is_the_same_arrangement_on_other_ranks() -> None:
    adjacent, apart = published(32, 2), published(32, 2, RINGS_ADJACENT)
    renamed = {rank: apart.grid.rank(adjacent.grid.coordinates(rank)) for rank in range(32)}
    for here, there in zip(both_passes(adjacent), both_passes(apart), strict=True):
        side = "q" if here.backward else "kv"
        for rank in range(32):
            expected = [tuple(sorted(renamed[r] for r in block)) for block in ring_operands(here[rank], side)]
            assert ring_operands(there[renamed[rank]], side) == expected
