"""Masks, token by token, against the definition written again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.attn_tile import AttnTile, TileWindow
from megatron_wallfacer.schedule.mask import CAUSAL, FULL, Mask, chunk_mask_of
from megatron_wallfacer.schedule.tiles import tiles

Token = tuple[int, int]
"""(document, position in it)."""
PADDING: Token = (-1, 0)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Mask, int, int]:
    """(mask, P, tokens of a chunk)."""
    cp_size = draw(st.integers(1, 4))
    left, right = (draw(st.none() | st.integers(0, most)) for most in (20, 5))
    if draw(st.booleans()):
        pieces = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        ends = [0]
        for piece in pieces:
            ends.append(ends[-1] + 2 * cp_size * piece)
        return Mask(left, draw(st.sampled_from((0, right))), tuple(ends), "per_document"), cp_size, sum(pieces)
    size = draw(st.integers(1, 5))
    tokens = 2 * cp_size * size
    inner = draw(st.none() | st.sets(st.integers(1, tokens - 1), min_size=1, max_size=8))
    # What is after the last document is padding.
    documents = None if inner is None else tuple(sorted({0, *inner, *draw(st.sampled_from(((), (tokens,))))}))
    return Mask(left, draw(st.sampled_from((0, right))), documents), cp_size, size


def tokens_of(chunk: int, mask: Mask, cp_size: int, size: int) -> list[Token]:
    """What a chunk consists of."""
    ends = mask.documents or (0, 2 * cp_size * size)
    whole = [(index, at) for index, (start, end) in enumerate(pairwise(ends)) for at in range(end - start)]
    if mask.shard_mode == "sequence":
        whole += [PADDING] * (2 * cp_size * size - len(whole))
        return whole[chunk * size : (chunk + 1) * size]
    found = []
    for index, (start, end) in enumerate(pairwise(ends)):
        piece = (end - start) // (2 * cp_size)
        found += [(index, chunk * piece + at) for at in range(piece)]
    return found


def sees(query: Token, key: Token, mask: Mask) -> bool:
    """The definition."""
    apart = key[1] - query[1]
    near = (mask.left is None or apart >= -mask.left) and (mask.right is None or apart <= mask.right)
    return query[0] == key[0] and near and query != PADDING


def cells(call: AttnTile) -> list[tuple[int, int]]:
    """Live pairs of a call."""
    (top, bottom), (first, end) = call.rows, call.cols
    left, right = call.window or TileWindow()
    lower = -(bottom - top) if left is None else -left
    upper = end - first if right is None else right
    upper = 0 if call.causal else upper
    return [(top + i, first + j) for i in range(bottom - top) for j in range(end - first) if lower <= j - i <= upper]


@given(layouts())
def test_a_pattern_says_which_chunks_are_live_and_which_wholly(layout: tuple[Mask, int, int]) -> None:
    mask, cp_size, size = layout
    chunk_mask = chunk_mask_of(mask, cp_size, size)
    assume(chunk_mask is not None)
    chunks = [tokens_of(chunk, mask, cp_size, size) for chunk in range(2 * cp_size)]
    for row, queries in enumerate(chunks):
        pairs = [[sees(q, k, mask) for q in queries for k in keys] for keys in chunks]
        assert [col for col, found in enumerate(pairs) if any(found)] == list(range(*chunk_mask.nonempty[row]))
        wholly = {col for col, found in enumerate(pairs) if all(found)}
        claimed = set(range(*chunk_mask.full[row]))
        # Where a chunk is of several documents, none is claimed, and none is.
        assert claimed <= wholly
        if len({document for document, _ in queries}) == 1 and queries[0] != PADDING:
            assert claimed == wholly
    assert chunk_mask.is_sparse == any(
        not any(sees(q, k, mask) for q in chunks[row] for k in chunks[col])
        for row in range(2 * cp_size)
        for col in range(row + 1)
    )


@given(layouts(), st.data())
def test_tiles_and_calls_cover_each_live_pair_once(layout: tuple[Mask, int, int], data: st.DataObject) -> None:
    mask, cp_size, size = layout
    chunk_mask = chunk_mask_of(mask, cp_size, size)
    assume(chunk_mask is not None)
    some = st.sets(st.integers(0, 2 * cp_size - 1), min_size=1).map(sorted)
    q_chunks, k_chunks = data.draw(some), data.draw(some)
    only = data.draw(st.none() | st.sets(st.sampled_from(q_chunks)))
    found: list[tuple[int, int]] = []
    for tile in tiles(q_chunks, k_chunks, causal=False, only=only, chunk_mask=chunk_mask):
        height, width = (tile.rows[1] - tile.rows[0]) * size, (tile.cols[1] - tile.cols[0]) * size
        calls: Sequence[AttnTile] = [AttnTile((0, height), (0, width))]
        if tile.partial:
            calls = mask.calls(q_chunks[slice(*tile.rows)], k_chunks[slice(*tile.cols)], cp_size, size)
            assert calls, "a masked tile of which nothing is live"
        for call in calls:
            live = cells(call)
            assert {i for i, _ in live} == set(range(*call.rows)), "a row that sees nothing"
            assert {j for _, j in live} == set(range(*call.cols)), "a column that nobody sees"
            found += [(tile.rows[0] * size + i, tile.cols[0] * size + j) for i, j in live]
    queries, keys = (
        [(chunk, token) for chunk in chunks for token in tokens_of(chunk, mask, cp_size, size)]
        for chunks in (q_chunks, k_chunks)
    )
    assert sorted(found) == [
        (i, j)
        for i, (chunk, q) in enumerate(queries)
        for j, (_, k) in enumerate(keys)
        if sees(q, k, mask) and (only is None or chunk in only)
    ]


def test_plain_masks_need_no_tokens() -> None:
    assert chunk_mask_of(CAUSAL, 4, 8) is chunk_mask_of(FULL, 4, 8) is None
    assert chunk_mask_of(Mask(documents=(0, 64)), 4, 8) is not None


def test_a_window_is_diagonals_of_its_tiles() -> None:
    assert Mask(left=2).calls([0], [0], 1, 4) == (AttnTile((0, 4), (0, 4), window=TileWindow(2, 0)),)
    # The next chunk sees the end of this one: rows and columns that are far apart are left out.
    assert Mask(left=2).calls([1], [0], 1, 4) == (AttnTile((0, 2), (2, 4), window=TileWindow(0, None)),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"left": -1}, r"window_size=\(-1, 0\): must be numbers of tokens"),
        ({"documents": (0,)}, r"cu_seqlens=\(0,\): must be ascending from 0"),
        ({"documents": (1, 4)}, "ascending from 0"),
        ({"documents": (0, 4, 4, 8)}, "ascending from 0"),
    ],
)
def test_nonsense_is_rejected(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Mask(**options)


def test_documents_must_fill_the_sequence_and_divide() -> None:
    with pytest.raises(
        OptionError, match=r"cu_seqlens=\[\.\.\., 17\]: must be a list that ends with at most 16, the number of"
    ):
        Mask(documents=(0, 17)).check(2, 16)
    with pytest.raises(OptionError, match=r"cu_seqlens=\[\.\.\., 8\]: must be a list that ends with 16, the number of"):
        Mask(documents=(0, 8), shard_mode="per_document").check(2, 16)
    with pytest.raises(OptionError, match="with a document of 6 tokens: must be padded to multiples of 2P = 4"):
        Mask(documents=(0, 6, 16), shard_mode="per_document").check(2, 16)
    Mask(documents=(0, 6, 16)).check(2, 16)
    Mask(documents=(0, 6, 9)).check(2, 16)  # what comes after is padding
