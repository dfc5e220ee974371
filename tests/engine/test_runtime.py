from __future__ import annotations

from megatron_wallfacer.engine.runtime import tile_slices
from megatron_wallfacer.schedule.tiles import Tile


def test_tile_in_tokens() -> None:
    assert tile_slices(Tile((1, 3), (0, 2)), 16) == (slice(16, 48), slice(0, 32))
