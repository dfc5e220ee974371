"""The ring: each block reaches each rank once, each message has its other end, each gradient ends at its origin."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.ring import Hop, RingStep, ring_steps

RINGS = [
    *((Grid(ring_outer=size), both_ways) for size in (1, 2, 3, 4, 5, 8) for both_ways in (False, True)),
    (Grid(ring_inner=5), False),
    (Grid(ring_inner=6), True),
    *((Grid(ring_outer=outer, ring_inner=inner), False) for outer in (2, 3) for inner in (2, 3, 4)),
    (Grid(team=2, ring_outer=3, ring_inner=2, placement=("ring_outer", "team", "ring_inner")), False),
]


@pytest.fixture(params=RINGS, ids=lambda ring: f"{ring[0]}{' both ways' * ring[1]}")
def rings(request: pytest.FixtureRequest) -> list[tuple[RingStep, ...]]:
    """The ring steps of every rank."""
    grid, both_ways = request.param
    return [ring_steps(grid, rank, bidirectional=both_ways) for rank in range(grid.cp_size)]


def test_every_block_reaches_every_rank_of_its_ring_once(rings: list[tuple[RingStep, ...]]) -> None:
    for rank, steps in enumerate(rings):
        assert steps[0].origin == rank
        origins = {step.origin for step in steps}
        assert len(origins) == len(steps)
        assert all({step.origin for step in rings[origin]} == origins for origin in origins)


def test_each_block_arrives_from_a_rank_that_has_it_by_then(rings: list[tuple[RingStep, ...]]) -> None:
    for rank, steps in enumerate(rings):
        for index, step in enumerate(steps):
            if step.source is None:
                assert index == 0
                continue
            assert step.source.step == index
            (sender, hop) = one_sender(rings[step.source.peer], Hop(step.source.axis, rank, index))
            assert rings[step.source.peer][sender].origin == step.origin
            assert sender < index
            assert hop.axis == step.source.axis


def one_sender(steps: tuple[RingStep, ...], wanted: Hop) -> tuple[int, Hop]:
    """The ring step of a rank that sends its block as wanted, and the hop."""
    found = [(index, hop) for index, step in enumerate(steps) for hop in step.destinations if hop == wanted]
    assert len(found) == 1
    return found[0]


def test_every_gradient_is_added_once_where_the_same_block_is(rings: list[tuple[RingStep, ...]]) -> None:
    for rank, steps in enumerate(rings):
        for index, step in enumerate(steps):
            assert (step.gradient_destination is None) == (index == 0)
            if step.gradient_destination is not None:
                there = rings[step.gradient_destination.peer][step.gradient_destination.step]
                assert there.origin == step.origin
                wanted = (rank, *kind(step.gradient_destination))
                expected = [s for s in there.gradient_sources if (s.peer, s.axis, s.closes_pass) == wanted]
                assert len(expected) == 1
        assert sum(len(step.gradient_sources) for step in steps) == len(steps) - 1


def kind(hop: Hop) -> tuple[str, bool]:
    return hop.axis, hop.closes_pass


def test_every_gradient_ends_at_its_origin(rings: list[tuple[RingStep, ...]]) -> None:
    for steps in rings:
        for step in steps:
            here, hops = step, 0
            while here.gradient_destination is not None:
                here = rings[here.gradient_destination.peer][here.gradient_destination.step]
                hops += 1
                assert hops <= len(steps)
            assert here == rings[step.origin][0]


def test_an_outer_hop_leaves_when_its_pass_begins() -> None:
    grid = Grid(ring_outer=3, ring_inner=4)
    for rank in range(12):
        for index, step in enumerate(ring_steps(grid, rank)):
            outer = [hop for hop in step.destinations if hop.axis == "ring_outer"]
            # Sent in the first step of a pass for the first step of the next one: a whole pass ahead.
            assert bool(outer) == (index in (0, 4))
            assert all(hop.step == index + 4 for hop in outer)


def test_both_ways_goes_half_way_round() -> None:
    steps = ring_steps(Grid(ring_outer=7), 0, bidirectional=True)
    assert [step.origin for step in steps] == [0, 6, 1, 5, 2, 4, 3]
    arriving = [step.source.peer for step in steps[1:]]
    assert arriving == [6, 1, 6, 1, 6, 1]


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_words_do_not_depend_on_the_shape_of_the_ring(outer: int, inner: int, data: st.DataObject) -> None:
    grid = Grid(ring_outer=outer, ring_inner=inner)
    steps = ring_steps(grid, data.draw(st.integers(0, grid.cp_size - 1)))
    assert sum(step.source is not None for step in steps) == grid.ring - 1
    assert sum(len(step.gradient_sources) for step in steps) == grid.ring - 1
