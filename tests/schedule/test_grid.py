import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import AXES, DEFAULT_PLACEMENT, RINGS_ADJACENT, TEAMS_ADJACENT, Grid
from tests.schedule.cases import grids


def groups(grid: Grid, axis: str) -> set[tuple[int, ...]]:
    return {grid.neighbours(rank, axis) for rank in range(grid.cp_size)}


@settings(max_examples=300)
@given(grids(), st.data())
def test_rank_is_the_inverse_of_coordinates(grid: Grid, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, grid.cp_size - 1))
    coordinates = grid.coordinates(rank)
    assert grid.rank(coordinates) == rank
    assert all(0 <= coordinates[axis] < grid.size_of(axis) for axis in AXES)


@settings(max_examples=300)
@given(grids(), st.data())
def test_coordinates_are_the_inverse_of_rank(grid: Grid, data: st.DataObject) -> None:
    coordinates = {axis: data.draw(st.integers(0, grid.size_of(axis) - 1)) for axis in AXES}
    assert grid.coordinates(grid.rank(coordinates)) == coordinates


@settings(max_examples=100)
@given(grids())
def test_first_axis_of_the_placement_varies_over_neighbouring_ranks(grid: Grid) -> None:
    for fastest in grid.placement[:1]:
        assert grid.neighbours(0, fastest) == tuple(range(grid.size_of(fastest)))


@settings(max_examples=200)
@given(grids(), st.sampled_from(AXES), st.data())
def test_neighbours_differ_along_their_axis_only(grid: Grid, axis: str, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, grid.cp_size - 1))
    here = grid.coordinates(rank)
    found = [grid.coordinates(neighbour) for neighbour in grid.neighbours(rank, axis)]
    assert found == [{**here, axis: index} for index in range(grid.size_of(axis))]


@settings(max_examples=50)
@given(grids(largest=64), st.sampled_from(AXES))
def test_groups_of_an_axis_share_out_the_ranks(grid: Grid, axis: str) -> None:
    members = sorted(rank for group in groups(grid, axis) for rank in group)
    assert members == list(range(grid.cp_size))


def test_teams_adjacent_placement_of_the_published_grid() -> None:
    grid = Grid(team=2, kv_team=2, ring_outer=2, placement=TEAMS_ADJACENT)
    assert groups(grid, "team") == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert groups(grid, "ring_outer") == {(0, 2), (1, 3), (4, 6), (5, 7)}
    assert groups(grid, "kv_team") == {(0, 4), (1, 5), (2, 6), (3, 7)}


def test_rings_adjacent_placement_of_the_published_grid() -> None:
    grid = Grid(team=2, kv_team=2, ring_outer=2, placement=RINGS_ADJACENT)
    assert groups(grid, "ring_outer") == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert groups(grid, "team") == {(0, 2), (1, 3), (4, 6), (5, 7)}
    assert groups(grid, "kv_team") == {(0, 4), (1, 5), (2, 6), (3, 7)}


def test_teams_adjacent_placement_of_the_team_ring() -> None:
    grid = Grid(team=2, ring_outer=4, placement=TEAMS_ADJACENT)
    assert groups(grid, "team") == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert groups(grid, "ring_outer") == {(0, 2, 4, 6), (1, 3, 5, 7)}


def test_rings_adjacent_placement_of_the_team_ring() -> None:
    grid = Grid(team=2, ring_outer=4, placement=RINGS_ADJACENT)
    assert groups(grid, "ring_outer") == {(0, 1, 2, 3), (4, 5, 6, 7)}
    assert groups(grid, "team") == {(0, 4), (1, 5), (2, 6), (3, 7)}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("size", [0, -2])
def test_axis_below_one_is_rejected(axis: str, size: int) -> None:
    with pytest.raises(OptionError) as error:
        Grid(**{axis: size})
    assert str(error.value) == f"{axis}_size={size}: must be a positive number of ranks"
    assert (error.value.option, error.value.value) == (f"{axis}_size", size)


@pytest.mark.parametrize(
    "placement", [("team",), ("team", "ring_outer", "ring_outer"), ("team", "ring_outer", "heads"), ()]
)
def test_placement_that_does_not_name_every_wide_axis_once_is_rejected(placement: tuple[str, ...]) -> None:
    with pytest.raises(OptionError) as error:
        Grid(team=2, ring_outer=3, placement=placement)
    assert str(error.value) == f"placement={','.join(placement)}: must be an order of team, ring_outer, each once"


def test_axes_of_one_rank_may_be_left_out_of_the_placement() -> None:
    assert Grid(team=2, ring_outer=3, placement=("team", "ring_outer")).placement == ("team", "ring_outer")


@settings(max_examples=100)
@given(grids())
def test_grids_that_differ_by_axes_of_one_rank_in_the_placement_are_equal(grid: Grid) -> None:
    narrow = tuple(axis for axis in AXES if grid.size_of(axis) == 1)
    again = Grid(**{axis: grid.size_of(axis) for axis in AXES}, placement=(*narrow, *grid.placement))
    assert again == grid
    assert hash(again) == hash(grid)


def test_default_placement_has_every_axis() -> None:
    assert sorted(DEFAULT_PLACEMENT) == sorted(TEAMS_ADJACENT) == sorted(RINGS_ADJACENT) == sorted(AXES)


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (4, 1), (1, 4), (3, 5)])
def test_ring_is_both_rings_together(outer: int, inner: int) -> None:
    assert Grid(team=2, ring_outer=outer, ring_inner=inner).ring == outer * inner


def test_grid_says_its_wide_axes() -> None:
    assert str(Grid(head=2, ring_outer=4)) == "head 2 x ring_outer 4"
    assert str(Grid()) == "one rank"
