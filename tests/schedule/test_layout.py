from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.schedule.layout import block_chunks, runs, shard_chunks


@st.composite
def blocks(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    """Some ranks of a group, in any order, and the size of the group."""
    cp_size = draw(st.integers(1, 4096))
    ranks = draw(st.lists(st.integers(0, cp_size - 1), min_size=1, max_size=32, unique=True))
    return tuple(ranks), cp_size


@pytest.mark.parametrize(("rank", "chunks"), [(0, (0, 7)), (1, (1, 6)), (2, (2, 5)), (3, (3, 4))])
def test_zig_zag_shard_of_four_ranks(rank: int, chunks: tuple[int, int]) -> None:
    assert shard_chunks(rank, 4) == chunks


@given(st.integers(1, 512))
def test_shards_share_out_the_sequence(cp_size: int) -> None:
    chunks = sorted(chunk for rank in range(cp_size) for chunk in shard_chunks(rank, cp_size))
    assert chunks == list(range(2 * cp_size))


@settings(max_examples=200)
@given(blocks())
def test_block_is_its_shards_in_order_of_position(block: tuple[tuple[int, ...], int]) -> None:
    ranks, cp_size = block
    chunks = block_chunks(ranks, cp_size)
    assert list(chunks) == sorted(chunks)
    assert set(chunks) == {*ranks, *(2 * cp_size - 1 - rank for rank in ranks)}


@given(st.sets(st.integers(0, 60), min_size=1), st.data())
def test_runs_are_where_the_chunks_stand_and_as_few_as_there_are(found: set[int], data: st.DataObject) -> None:
    block = sorted(found)
    chunks = sorted(data.draw(st.sets(st.sampled_from(block))))
    ranges = runs(chunks, block)
    assert [chunk for first, end in ranges for chunk in block[first:end]] == chunks
    assert all(before < after for (_, before), (after, _) in pairwise(ranges))
