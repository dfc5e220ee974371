"""Few copies in place of many: they transfer the same bytes to the same places."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.schedule.copies import Pair, Permutation, permutation, strided
from megatron_wallfacer.schedule.program import WORKSPACE, Operand

Memory = dict[tuple[str, int], int]
#: Elements of one byte, blocks of four.
WIDE = 4


def block(offset: int, length: int = 16, buffer: str = WORKSPACE) -> Operand:
    return Operand(buffer, "bytes", (length,), (1,), offset)


def elements(operand: Operand) -> list[tuple[str, int]]:
    """Places of an operand's elements, in its order."""
    size = WIDE if operand.view == "wide" else 1
    starts = (
        operand.offset + sum(at * step for at, step in zip(index, operand.strides, strict=True))
        for index in product(*map(range, operand.shape))
    )
    return [(operand.buffer, size * start + byte) for start in starts for byte in range(size)]


def copied(pairs: Sequence[Pair]) -> Memory:
    """By place that is written, the place of the workspace whose byte it gets."""
    found: Memory = {}
    for into, source in pairs:
        for there, here in zip(elements(into), elements(source), strict=True):
            assert there not in found
            found[there] = here[1]
    return found


def permuted(step: Permutation) -> Memory:
    blocks = [step.into.shape[1] * WIDE * n for n in range(len(step.index) + 1)]
    into, source = elements(step.into), elements(step.source)
    assert len(into) == blocks[-1]
    size = blocks[1]
    return {
        into[at * size + byte]: source[number * size + byte][1]
        for at, number in enumerate(step.index)
        for byte in range(size)
    }


def as_permutation(pairs: Sequence[Pair]) -> Permutation | None:
    return permutation(pairs, lambda operand: 1, WIDE)


orders = st.integers(1, 9).flatmap(lambda number: st.permutations(range(number)))


@settings(max_examples=100)
@given(orders, st.integers(16, 40), st.integers(16, 40), st.booleans())
def test_strided_pairs_copy_the_same(order: Sequence[int], here: int, there: int, twice: bool) -> None:
    pairs = [(block(1000 + at * here), block(number * there)) for at, number in enumerate(order)]
    if twice:
        pairs += [(block(2000 + at * here), block(5000 + number * there)) for at, number in enumerate(order)]
    found = strided(pairs)
    assert copied(found) == copied(pairs)
    # PyTorch has no negative strides.
    assert all(step > 0 for pair in found for operand in pair for step in operand.strides)
    if list(order) == sorted(order):
        assert len(found) == 1


def test_rows_at_equal_distances_in_both_buffers_are_one_pair() -> None:
    pairs = [(block(1000 + 32 * at), block(24 * at, buffer="q")) for at in (3, 0, 2, 1)]
    assert strided(pairs) == [
        (Operand(WORKSPACE, "bytes", (4, 16), (32, 1), 1000), Operand("q", "bytes", (4, 16), (24, 1), 0))
    ]


def test_a_longer_series_keeps_its_first_pair() -> None:
    sources = (0, 50, 150, 250, 350)
    pairs = [(block(1000 + 16 * at), block(source)) for at, source in enumerate(sources)]
    assert [into.shape for into, _ in strided(pairs)] == [(16,), (4, 16)]


def test_pairs_of_other_shapes_or_buffers_stay_apart() -> None:
    pairs = [(block(1000), block(0)), (block(1016, 8), block(16, 8)), (block(1032), block(32, buffer="q"))]
    assert sorted(strided(pairs)) == sorted(pairs)


@settings(max_examples=100)
@given(orders, st.sampled_from([16, 32, 48, 60]), st.sampled_from([0, 4, 64]), st.booleans())
def test_blocks_in_any_order_are_one_permutation(order: Sequence[int], size: int, gap: int, kept: bool) -> None:
    buffer, first = ("kept", 0) if kept else (WORKSPACE, 4000)
    pairs = [
        (block(first + at * size, size, buffer), block(number * (size + gap), size)) for at, number in enumerate(order)
    ]
    found = as_permutation(pairs)
    if found is None:
        # Blocks of less than 16 bytes.
        assert size == 60 or gap == 4
        return
    assert permuted(found) == copied(pairs)


def test_blocks_of_several_sizes_are_blocks_of_their_common_divisor() -> None:
    pairs = [(block(1024, 64), block(16, 64)), (block(1088, 16), block(0)), (block(1104, 32), block(80, 32))]
    found = as_permutation(pairs)
    assert found is not None
    assert (found.into.shape, found.index) == ((7, 4), (1, 2, 3, 4, 0, 5, 6))
    assert permuted(found) == copied(pairs)


def test_padding_between_buffers_is_filled_and_no_other_gap() -> None:
    padded = [(block(1024, 96), block(96, 96)), (block(1152, 96), block(0, 96))]
    found = as_permutation(padded)
    assert found is not None
    assert copied(padded).items() <= permuted(found).items()
    assert as_permutation([(block(1024, 96), block(96, 96)), (block(1136, 96), block(0, 96))]) is None
    assert as_permutation([(block(1024, 96), block(96, 96)), (block(1280, 96), block(0, 96))]) is None


@pytest.mark.parametrize(
    "pairs",
    [
        [(block(64), block(16)), (block(80), block(0, buffer="q"))],
        [(block(64), block(16)), (block(80, buffer="kept"), block(0))],
        [(block(16, buffer="kept"), block(16)), (block(32, buffer="kept"), block(0))],
        [(block(64), block(16)), (block(80, 8), block(0, 8))],
        [(block(66), block(16)), (block(82), block(0))],
        [(block(16), block(64)), (block(32), block(0))],
        [
            (block(64), block(16)),
            (Operand(WORKSPACE, "bytes", (2, 8), (8, 1), 80), Operand("q", "own", (2, 8), (9, 1), 0)),
        ],
        [(block(64), block(16)), (block(80)._replace(view="input"), block(0))],
    ],
    ids=["sources", "buffers", "part of a buffer", "small", "unaligned", "overlap", "strided", "dtypes"],
)
def test_what_is_no_permutation_of_blocks_stays_a_list_of_copies(pairs: list[Pair]) -> None:
    assert as_permutation(pairs) is None
