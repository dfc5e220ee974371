"""Kernel calls that are joined cover what they covered apart, and are joined where they can be."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_wallfacer.schedule.batches import batches
from megatron_wallfacer.schedule.mask import Band, KernelCall, Lengths, Mask
from tests.schedule.test_mask import layouts


def apart(call: KernelCall) -> list[KernelCall]:
    """The calls that were joined."""
    if call.lengths is None:
        return [call]
    found, (row, col) = [], (call.rows[0], call.cols[0])
    for height, width in zip(*call.lengths, strict=True):
        found.append(KernelCall((row, row + height), (col, col + width), causal=call.causal))
        row, col = row + height, col + width
    assert (row, col) == (call.rows[1], call.cols[1])
    return found


def same(call: KernelCall) -> KernelCall:
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
        if call.lengths is not None:
            assert len(call.lengths.rows) == len(call.lengths.cols) > 1
            assert call.band is None
            assert not call.causal or call.lengths.rows == call.lengths.cols


@given(layouts(), st.data())
def test_no_two_that_are_left_could_be_one(layout: tuple[Mask, int, int], data: st.DataObject) -> None:
    mask, cp_size, size = layout
    some = st.sets(st.integers(0, 2 * cp_size - 1), min_size=1).map(sorted)
    joined = batches(mask.calls(data.draw(some), data.draw(some), cp_size, size))
    for one in joined:
        for other in joined:
            follows = (one.rows[1], one.cols[1]) == (other.rows[0], other.cols[0])
            alike = same(one).causal == same(other).causal and one.band is None is other.band
            assert not (follows and alike)


def test_documents_of_a_chunk_are_one_call() -> None:
    documents = (0, 5, 6, 12)
    calls = Mask(documents=documents).calls([0], [0], 1, 12)
    assert len(calls) == 3
    lengths = tuple(end - start for start, end in pairwise(documents))
    assert batches(calls) == (KernelCall((0, 12), (0, 12), causal=True, lengths=Lengths(lengths, lengths)),)


@pytest.mark.parametrize("documents", [2, 7])
def test_documents_that_are_cut_are_a_call_for_each_pair_of_chunks(documents: int) -> None:
    """Four ranks; each document has two tokens in each of eight chunks."""
    mask = Mask(documents=tuple(range(0, 16 * documents + 1, 16)), cut="document")
    for k_chunk, causal in ((2, False), (3, True)):
        calls = mask.calls([3], [k_chunk], 4, 2 * documents)
        assert len(calls) == documents
        assert [(call.causal, call.lengths) for call in batches(calls)] == [(causal, Lengths(*[(2,) * documents] * 2))]


def test_pairs_of_chunks_on_a_diagonal_are_one_call() -> None:
    mask = Mask(documents=(0, 16, 32), cut="document")
    calls = mask.calls([5, 6], [0, 1], 4, 4)
    assert len(calls) == 8
    assert [call.rows for call in batches(calls)] == [(0, 8), (0, 4), (4, 8)]


def test_bands_and_gaps_are_not_joined() -> None:
    calls = (
        KernelCall((0, 3), (0, 3), causal=True),
        KernelCall((3, 6), (3, 6), band=Band(-1, 0)),
        KernelCall((6, 8), (6, 8), causal=True),
        KernelCall((9, 11), (8, 10), causal=True),
        KernelCall((11, 13), (10, 13)),
    )
    assert batches(calls) == calls


def test_a_pair_of_one_row_and_one_column_goes_with_either() -> None:
    squares = (
        KernelCall((0, 3), (0, 3), causal=True),
        KernelCall((3, 4), (3, 4)),
        KernelCall((4, 6), (4, 6), causal=True),
    )
    assert batches(squares) == (KernelCall((0, 6), (0, 6), causal=True, lengths=Lengths((3, 1, 2), (3, 1, 2))),)
    wide = (KernelCall((0, 1), (0, 1), causal=True), KernelCall((1, 3), (1, 5)))
    assert batches(wide) == (KernelCall((0, 3), (0, 5), lengths=Lengths((1, 2), (1, 4))),)
