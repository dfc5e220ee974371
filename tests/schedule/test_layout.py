import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.schedule.layout import block_chunks, inverse_order, shard_chunks, sorting_order


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


@settings(max_examples=200)
@given(blocks())
def test_sorting_order_turns_gathered_shards_into_a_block(block: tuple[tuple[int, ...], int]) -> None:
    ranks, cp_size = block
    gathered = [chunk for rank in ranks for chunk in (rank, 2 * cp_size - 1 - rank)]
    assert tuple(gathered[index] for index in sorting_order(ranks, cp_size)) == block_chunks(ranks, cp_size)


@settings(max_examples=200)
@given(blocks())
def test_inverse_order_turns_a_block_back_into_gathered_shards(block: tuple[tuple[int, ...], int]) -> None:
    ranks, cp_size = block
    back = inverse_order(sorting_order(ranks, cp_size))
    chunks = block_chunks(ranks, cp_size)
    assert [chunks[index] for index in back] == [c for rank in ranks for c in (rank, 2 * cp_size - 1 - rank)]
