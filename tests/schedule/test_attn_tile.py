from __future__ import annotations

import pickle

from megatron_wallfacer.schedule.attn_tile import AttnTile, CuSeqlens, documents_of


class CountedTuple(tuple):
    """A tuple that counts how often its hash is computed."""

    hashed = 0

    def __hash__(self) -> int:
        CountedTuple.hashed += 1
        return super().__hash__()


def test_boundaries_are_hashed_once() -> None:
    documents = CuSeqlens(CountedTuple((0, 3, 4)), (0, 3, 4))
    tile, before = AttnTile((0, 4), (0, 4), cu_seqlens=documents), CountedTuple.hashed
    assert len({tile: 1, (tile, 2): 2}) == 2
    assert CountedTuple.hashed == before == 1


def test_equal_boundaries_are_equal() -> None:
    one, other = (CuSeqlens((0, 3, 4), (0, 5, 6)) for _ in range(2))
    assert one == other == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(other) == hash(pickle.loads(pickle.dumps(one)))
    assert one != CuSeqlens((0, 3, 4), (0, 4, 6))


def test_documents_are_tiles_counted_from_the_corner() -> None:
    tile = AttnTile((10, 14), (20, 26), cu_seqlens=CuSeqlens((0, 3, 4), (0, 5, 6)))
    assert (tile.height, tile.width) == (4, 6)
    assert documents_of(tile) == [AttnTile((0, 3), (0, 5)), AttnTile((3, 4), (5, 6))]
