import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.schedule.layout import block_chunks
from megatron_wallfacer.schedule.tiles import Tile, tiles
from tests.schedule.proof import chunks_of

sorted_chunks = st.sets(st.integers(0, 40), max_size=16).map(sorted)
some_chunks = st.sets(st.integers(0, 40), min_size=1, max_size=16).map(sorted)


@st.composite
def teams(draw: st.DrawFn) -> tuple[int, list[int], int]:
    """(P, any ranks as a team, any rank whose keys come by)."""
    cp_size = draw(st.integers(1, 128))
    ranks = st.integers(0, cp_size - 1)
    return cp_size, draw(st.lists(ranks, min_size=1, max_size=16, unique=True)), draw(ranks)


@st.composite
def adjacent_teams(draw: st.DrawFn) -> tuple[int, range, int]:
    """(P, neighbouring ranks as a team, any rank whose keys come by)."""
    cp_size = draw(st.integers(1, 256))
    first = draw(st.integers(0, cp_size - 1))
    team = range(first, draw(st.integers(first + 1, cp_size)))
    return cp_size, team, draw(st.integers(0, cp_size - 1))


def painted(found: tuple[Tile, ...], q_chunks: list[int], k_chunks: list[int]) -> list[tuple[int, int, str]]:
    """Every pair of chunks that the tiles compute, and how."""
    pairs = []
    for tile in found:
        for i, q in enumerate(q_chunks[slice(*tile.rows)]):
            for j, k in enumerate(k_chunks[slice(*tile.cols)]):
                if not tile.causal or j < i:
                    pairs.append((q, k, "full"))
                elif j == i:
                    pairs.append((q, k, "triangle"))
    return sorted(pairs)


def off_diagonal(found: tuple[Tile, ...]) -> list[Tile]:
    return [tile for tile in found if not tile.causal]


def on_diagonal(found: tuple[Tile, ...]) -> list[Tile]:
    return [tile for tile in found if tile.causal]


@settings(max_examples=1500)
@given(sorted_chunks, sorted_chunks)
def test_causal_tiles_cover_each_live_pair_once(q_chunks: list[int], k_chunks: list[int]) -> None:
    live = [(q, k, "triangle" if q == k else "full") for q in q_chunks for k in k_chunks if k <= q]
    assert painted(tiles(q_chunks, k_chunks, causal=True), q_chunks, k_chunks) == sorted(live)


@settings(max_examples=300)
@given(some_chunks, some_chunks)
def test_full_attention_is_one_tile_that_covers_everything(q_chunks: list[int], k_chunks: list[int]) -> None:
    found = tiles(q_chunks, k_chunks, causal=False)
    assert len(found) == 1
    assert painted(found, q_chunks, k_chunks) == sorted((q, k, "full") for q in q_chunks for k in k_chunks)


@settings(max_examples=500)
@given(sorted_chunks, sorted_chunks)
def test_causal_tiles_are_square_and_on_equal_chunks(q_chunks: list[int], k_chunks: list[int]) -> None:
    for tile in on_diagonal(tiles(q_chunks, k_chunks, causal=True)):
        assert q_chunks[slice(*tile.rows)] == k_chunks[slice(*tile.cols)]


@settings(max_examples=500)
@given(sorted_chunks, sorted_chunks)
def test_no_two_tiles_could_be_one(q_chunks: list[int], k_chunks: list[int]) -> None:
    found = off_diagonal(tiles(q_chunks, k_chunks, causal=True))
    stretches = [(tile.cols, row) for tile in found for row in tile.rows]
    assert len(set(stretches)) == len(stretches)


@settings(max_examples=500)
@given(sorted_chunks, sorted_chunks)
def test_area_is_the_work_of_the_live_pairs(q_chunks: list[int], k_chunks: list[int]) -> None:
    work = sum(0.5 if q == k else 1.0 for q in q_chunks for k in k_chunks if k <= q)
    assert sum(tile.area for tile in tiles(q_chunks, k_chunks, causal=True)) == work


@settings(max_examples=500)
@given(adjacent_teams())
def test_team_of_neighbours_needs_one_call_off_the_diagonal(case: tuple[int, range, int]) -> None:
    cp_size, team, other = case
    found = tiles(block_chunks(team, cp_size), block_chunks([other], cp_size), causal=True)
    assert other in team or (len(found) == 1 and not found[0].causal)


@settings(max_examples=1000)
@given(teams())
def test_any_team_needs_at_most_two_calls_off_the_diagonal(case: tuple[int, list[int], int]) -> None:
    cp_size, team, other = case
    found = tiles(block_chunks(team, cp_size), block_chunks([other], cp_size), causal=True)
    assert len(off_diagonal(found)) <= 2


@settings(max_examples=1000)
@given(teams())
def test_diagonal_needs_at_most_two_square_causal_calls(case: tuple[int, list[int], int]) -> None:
    cp_size, team, other = case
    found = on_diagonal(tiles(block_chunks(team, cp_size), block_chunks([other], cp_size), causal=True))
    assert len(found) <= 2
    assert bool(found) == (other in team)
    assert all(tile.rows[1] - tile.rows[0] == tile.cols[1] - tile.cols[0] for tile in found)


@settings(max_examples=300)
@given(teams(), st.data())
def test_any_two_shards_cost_half_a_shard_square(case: tuple[int, list[int], int], data: st.DataObject) -> None:
    cp_size, team, other = case
    mine = data.draw(st.sampled_from(team))
    found = tiles(chunks_of([mine], cp_size), chunks_of([other], cp_size), causal=True)
    assert sum(tile.area for tile in found) == 2


@given(some_chunks)
def test_equal_blocks_are_one_causal_square(chunks: list[int]) -> None:
    assert tiles(chunks, chunks, causal=True) == (Tile((0, len(chunks)), (0, len(chunks)), causal=True),)


@pytest.mark.parametrize(("q_chunks", "k_chunks"), [([0], [1]), ([2, 3], [4, 9]), ([], [1, 2]), ([1, 2], []), ([], [])])
def test_no_tile_where_nothing_is_live(q_chunks: list[int], k_chunks: list[int]) -> None:
    assert tiles(q_chunks, k_chunks, causal=True) == ()


def test_rows_before_every_key_are_left_out() -> None:
    assert tiles([0, 5], [3, 4], causal=True) == (Tile((1, 2), (0, 2)),)


@settings(max_examples=500)
@given(sorted_chunks, sorted_chunks, st.sets(st.integers(0, 40)), st.booleans())
def test_tiles_of_some_queries_only_are_those_of_all_without_the_others(
    q_chunks: list[int], k_chunks: list[int], only: set[int], causal: bool
) -> None:
    everything = painted(tiles(q_chunks, k_chunks, causal=causal), q_chunks, k_chunks)
    wanted = [pair for pair in everything if pair[0] in only]
    assert painted(tiles(q_chunks, k_chunks, causal=causal, only=only), q_chunks, k_chunks) == wanted
