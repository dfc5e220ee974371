"""Kernel calls that are joined cover what they covered apart, and are joined where they can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_wallfacer.schedule.attn_tile import AttnTile, CuSeqlens, TileWindow, documents_of
from megatron_wallfacer.schedule.batches import batches
from megatron_wallfacer.schedule.mask import Mask
from tests.schedule.test_mask import layouts


def apart(call: AttnTile) -> list[AttnTile]:
    """The calls that were joined."""
    if call.cu_seqlens is None:
        return [call]
    row, col = call.rows[0], call.cols[0]
    assert (call.cu_seqlens.q[-1], call.cu_seqlens.k[-1]) == (call.height, call.width)
    shifted = [(tile, [[i + row for i in tile.rows], [j + col for j in tile.cols]]) for tile in documents_of(call)]
    return [tile._replace(rows=tuple(rows), cols=tuple(cols)) for tile, (rows, cols) in shifted]


def same(call: AttnTile) -> AttnTile:
    """One name for a single pair, which is a causal square and a rectangle."""
    single = call.rows[1] - call.rows[0] == call.cols[1] - call.cols[0] == 1
    return call._replace(causal=False) if single else call


@given(layouts(), st.data())
def test_joined_calls_are_the_calls(layout: tuple[Mask, int, int], data: st.DataObject) -> None:
    mask, cp_size, size = layout
    some = st.sets(st.integers(0, 2 * cp_size - 1), min_size=1).map(sorted)
    calls = mask.calls(data.draw(some), data.draw(some), cp_size, size)
    joined = batches(calls)
    assert sorted(same(part) for call in joined for part in apart(call)) == sorted(map(same, calls))
    for call in joined:
        if call.cu_seqlens is not None:
            assert len(call.cu_seqlens.q) == len(call.cu_seqlens.k) > 2
            assert call.cu_seqlens.q[0] == call.cu_seqlens.k[0] == 0
            assert call.window is None
            assert not call.causal or call.cu_seqlens.q == call.cu_seqlens.k


@given(layouts(), st.data())
def test_no_two_that_are_left_could_be_one(layout: tuple[Mask, int, int], data: st.DataObject) -> None:
    mask, cp_size, size = layout
    some = st.sets(st.integers(0, 2 * cp_size - 1), min_size=1).map(sorted)
    joined = batches(mask.calls(data.draw(some), data.draw(some), cp_size, size))
    for one in joined:
        for other in joined:
            follows = (one.rows[1], one.cols[1]) == (other.rows[0], other.cols[0])
            alike = same(one).causal == same(other).causal and one.window is None is other.window
            assert not (follows and alike)


def test_documents_of_a_chunk_are_one_call() -> None:
    documents = (0, 5, 6, 12)
    calls = Mask(documents=documents).calls([0], [0], 1, 12)
    assert len(calls) == 3
    together = CuSeqlens(documents, documents)
    assert batches(calls) == (AttnTile((0, 12), (0, 12), causal=True, cu_seqlens=together),)


@pytest.mark.parametrize("documents", [2, 7])
def test_documents_that_are_cut_are_a_call_for_each_pair_of_chunks(documents: int) -> None:
    """Four ranks; each document has two tokens in each of eight chunks."""
    mask = Mask(documents=tuple(range(0, 16 * documents + 1, 16)), shard_mode="per_document")
    for k_chunk, causal in ((2, False), (3, True)):
        calls = mask.calls([3], [k_chunk], 4, 2 * documents)
        assert len(calls) == documents
        ends = tuple(range(0, 2 * documents + 1, 2))
        assert [(call.causal, call.cu_seqlens) for call in batches(calls)] == [(causal, CuSeqlens(ends, ends))]


def test_pairs_of_chunks_on_a_diagonal_are_one_call() -> None:
    mask = Mask(documents=(0, 16, 32), shard_mode="per_document")
    calls = mask.calls([5, 6], [0, 1], 4, 4)
    assert len(calls) == 8
    assert [call.rows for call in batches(calls)] == [(0, 8), (0, 4), (4, 8)]


def test_windows_and_gaps_are_not_joined() -> None:
    calls = (
        AttnTile((0, 3), (0, 3), causal=True),
        AttnTile((3, 6), (3, 6), window=TileWindow(1, 0)),
        AttnTile((6, 8), (6, 8), causal=True),
        AttnTile((9, 11), (8, 10), causal=True),
        AttnTile((11, 13), (10, 13)),
    )
    assert batches(calls) == calls


def test_a_pair_of_one_row_and_one_column_goes_with_either() -> None:
    squares = (
        AttnTile((0, 3), (0, 3), causal=True),
        AttnTile((3, 4), (3, 4)),
        AttnTile((4, 6), (4, 6), causal=True),
    )
    assert batches(squares) == (
        AttnTile((0, 6), (0, 6), causal=True, cu_seqlens=CuSeqlens((0, 3, 4, 6), (0, 3, 4, 6))),
    )
    wide = (AttnTile((0, 1), (0, 1), causal=True), AttnTile((1, 3), (1, 5)))
    assert batches(wide) == (AttnTile((0, 3), (0, 5), cu_seqlens=CuSeqlens((0, 1, 3), (0, 1, 5))),)
