"""The ring: each block visits each rank once, each message has its other end, each sum comes home."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.ring import Link, Visit, visits

RINGS = [
    *((Grid(ring_outer=size), both_ways) for size in (1, 2, 3, 4, 5, 8) for both_ways in (False, True)),
    (Grid(ring_inner=5), False),
    (Grid(ring_inner=6), True),
    *((Grid(ring_outer=outer, ring_inner=inner), False) for outer in (2, 3) for inner in (2, 3, 4)),
    (Grid(team=2, ring_outer=3, ring_inner=2, placement=("ring_outer", "team", "ring_inner")), False),
]


@pytest.fixture(params=RINGS, ids=lambda ring: f"{ring[0]}{' both ways' * ring[1]}")
def turns(request: pytest.FixtureRequest) -> list[tuple[Visit, ...]]:
    """The visits of every rank."""
    grid, both_ways = request.param
    return [visits(grid, rank, bidirectional=both_ways) for rank in range(grid.cp_size)]


def test_every_block_visits_every_rank_of_its_ring_once(turns: list[tuple[Visit, ...]]) -> None:
    for rank, turn in enumerate(turns):
        assert turn[0].origin == rank
        origins = {visit.origin for visit in turn}
        assert len(origins) == len(turn)
        assert all({visit.origin for visit in turns[origin]} == origins for origin in origins)


def test_each_block_arrives_from_a_rank_that_has_it_by_then(turns: list[tuple[Visit, ...]]) -> None:
    for rank, turn in enumerate(turns):
        for index, visit in enumerate(turn):
            if visit.arrives is None:
                assert index == 0
                continue
            assert visit.arrives.visit == index
            (sender, link) = one_sender(turns[visit.arrives.peer], Link(visit.arrives.axis, rank, index))
            assert turns[visit.arrives.peer][sender].origin == visit.origin
            assert sender < index
            assert link.axis == visit.arrives.axis


def one_sender(turn: tuple[Visit, ...], wanted: Link) -> tuple[int, Link]:
    """The visit of a rank that forwards as wanted, and how."""
    found = [(index, link) for index, visit in enumerate(turn) for link in visit.forwards if link == wanted]
    assert len(found) == 1
    return found[0]


def test_every_sum_is_added_once_where_the_same_block_is(turns: list[tuple[Visit, ...]]) -> None:
    for rank, turn in enumerate(turns):
        for index, visit in enumerate(turn):
            assert (visit.returns is None) == (index == 0)
            if visit.returns is not None:
                there = turns[visit.returns.peer][visit.returns.visit]
                assert there.origin == visit.origin
                expected = [s for s in there.sums if (s.peer, s.axis, s.closes) == (rank, *kind(visit.returns))]
                assert len(expected) == 1
        assert sum(len(visit.sums) for visit in turn) == len(turn) - 1


def kind(link: Link) -> tuple[str, bool]:
    return link.axis, link.closes


def test_every_sum_ends_at_home(turns: list[tuple[Visit, ...]]) -> None:
    for turn in turns:
        for visit in turn:
            here, hops = visit, 0
            while here.returns is not None:
                here = turns[here.returns.peer][here.returns.visit]
                hops += 1
                assert hops <= len(turn)
            assert here == turns[visit.origin][0]


def test_an_outer_hop_leaves_when_its_turn_begins() -> None:
    grid = Grid(ring_outer=3, ring_inner=4)
    for rank in range(12):
        for index, visit in enumerate(visits(grid, rank)):
            outer = [link for link in visit.forwards if link.axis == "ring_outer"]
            # Sent at the first visit of a turn, for the first visit of the next: a whole inner turn ahead.
            assert bool(outer) == (index in (0, 4))
            assert all(link.visit == index + 4 for link in outer)


def test_both_ways_goes_half_way_round() -> None:
    turn = visits(Grid(ring_outer=7), 0, bidirectional=True)
    assert [visit.origin for visit in turn] == [0, 6, 1, 5, 2, 4, 3]
    arriving = [visit.arrives.peer for visit in turn[1:]]
    assert arriving == [6, 1, 6, 1, 6, 1]


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_words_do_not_depend_on_the_shape_of_the_ring(outer: int, inner: int, data: st.DataObject) -> None:
    grid = Grid(ring_outer=outer, ring_inner=inner)
    turn = visits(grid, data.draw(st.integers(0, grid.cp_size - 1)))
    assert sum(visit.arrives is not None for visit in turn) == grid.ring - 1
    assert sum(len(visit.sums) for visit in turn) == grid.ring - 1
