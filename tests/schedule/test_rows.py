"""Rows of values in memory: ranges that two blocks share, and cuts of operands."""

from __future__ import annotations

import itertools

import pytest

from megatron_wallfacer.schedule.program import WORKSPACE, Operand
from megatron_wallfacer.schedule.rows import common_rows, contiguous, cut, cut_heads, placed_rows


@pytest.mark.parametrize(
    ("source", "into", "chunks", "ranges"),
    [
        ((0, 7), (0, 7), (0, 7), [((0, 2), (0, 2))]),
        ((0, 7), (0, 3, 4, 7), (0, 7), [((0, 1), (0, 1)), ((1, 2), (3, 4))]),
        ((3, 4), (0, 3, 4, 7), (3, 4), [((0, 2), (1, 3))]),
        ((0, 3, 4, 7), (3, 4), (3, 4), [((1, 3), (0, 2))]),
        ((0, 1, 2, 3), (0, 2), (0, 2), [((0, 1), (0, 1)), ((2, 3), (1, 2))]),
        ((0, 1, 2, 3, 4), (1, 2, 4), (1, 2, 4), [((1, 3), (0, 2)), ((4, 5), (2, 3))]),
        ((0, 1, 5), (0, 1, 3, 4, 5), (0, 1, 5), [((0, 2), (0, 2)), ((2, 3), (4, 5))]),
        ((2, 5), (2, 5), (5,), [((1, 2), (1, 2))]),
        ((2, 5), (2, 5), (), []),
    ],
)
def test_ranges_of_common_rows(
    source: tuple[int, ...],
    into: tuple[int, ...],
    chunks: tuple[int, ...],
    ranges: list[tuple[tuple[int, int], tuple[int, int]]],
) -> None:
    assert list(common_rows(source, into, chunks)) == ranges


def test_common_ranges_of_any_two_blocks_hold_the_same_chunks_each_once() -> None:
    blocks = [one for size in range(1, 6) for one in itertools.combinations(range(5), size)]
    for source, into in itertools.product(blocks, repeat=2):
        both = sorted(set(source) & set(into))
        found = list(common_rows(source, into, both))
        assert [chunk for (first, end), _ in found for chunk in source[first:end]] == both
        assert [chunk for _, (first, end) in found for chunk in into[first:end]] == both
        for (_, end), (start, _) in itertools.pairwise(there for there, _ in found):
            assert end < start or into.index(source[start]) > into.index(source[end - 1]) + 1


@pytest.mark.parametrize(
    ("rows", "block", "into", "found"),
    [
        ((2, 5), (1, 6), (1, 6), [((2, 5), (2, 5))]),
        ((0, 6), (1, 6), (0, 1, 6, 7), [((0, 6), (3, 9))]),
        ((2, 5), (1, 6), (0, 1, 2, 5, 6, 7), [((2, 3), (5, 6)), ((3, 5), (12, 14))]),
        ((3, 6), (1, 6), (0, 1, 2, 5, 6, 7), [((3, 6), (12, 15))]),
    ],
)
def test_rows_of_a_block_in_one_that_has_more(
    rows: tuple[int, int], block: tuple[int, ...], into: tuple[int, ...], found: list
) -> None:
    """Chunks of three tokens."""
    assert list(placed_rows(rows, block, into, 3)) == found


# --- operands ---


def test_strides_of_a_contiguous_tensor() -> None:
    assert contiguous((6, 2, 4, 8)) == (64, 32, 8, 1)
    assert contiguous((5,)) == (1,)


def test_cuts_are_rows_and_heads_of_the_same_memory() -> None:
    whole = Operand(WORKSPACE, "input", (6, 2, 4, 8), (64, 32, 8, 1), 128)
    assert cut(whole, (2, 5)) == whole._replace(shape=(3, 2, 4, 8), offset=128 + 2 * 64)
    assert cut_heads(whole, range(1, 3)) == whole._replace(shape=(6, 2, 2, 8), offset=128 + 8)
    statistics = Operand(WORKSPACE, "wide", (6, 2, 4), (8, 4, 1), 0)
    assert cut_heads(statistics, range(3, 4)) == statistics._replace(shape=(6, 2, 1), offset=3)
