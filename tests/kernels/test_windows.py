from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.kernels.reference import unmasked_pairs
from megatron_wallfacer.kernels.windows import WindowSize, bottom_right, strips, top_left
from megatron_wallfacer.schedule.attn_tile import AttnTile, TileWindow

SIZES = ((1, 1), (1, 4), (4, 1), (4, 4), (3, 7), (7, 3), (7, 2))


def tiles(rows: int, cols: int) -> list[AttnTile]:
    """Tiles of all windows in which each row and each column has an unmasked pair."""
    sides = [None, *range(-rows - 1, cols + 2)]
    windows = [TileWindow(None if lower is None else -lower, upper) for lower, upper in product(sides, sides)]
    found = [AttnTile((0, rows), (0, cols), window=window) for window in windows]
    return [tile for tile in found if all(pairs(tile).any(axis).all() for axis in (0, 1))]


def pairs(tile: AttnTile) -> torch.Tensor:
    return unmasked_pairs(tile.window, tile.height, tile.width, device=torch.device("cpu"))


def seen(window: WindowSize, rows: int, cols: int, first: int) -> torch.Tensor:
    """Pairs of a window if row 0 stands at column ``first``: what the libraries' manuals say."""
    row, col = torch.arange(rows).unsqueeze(-1), torch.arange(cols)
    left = cols + rows if window.left is None else window.left
    right = cols + rows if window.right is None else window.right
    return (col >= row + first - left) & (col <= row + first + right)


CASES = [tile for rows, cols in SIZES for tile in tiles(rows, cols)]


def test_there_are_windows_to_try() -> None:
    assert len(CASES) > 150


def test_sizes_from_the_bottom_right_corner_are_the_window() -> None:
    for tile in CASES:
        rows, cols = tile.height, tile.width
        assert torch.equal(seen(bottom_right(tile), rows, cols, cols - rows), pairs(tile)), tile


def test_sizes_from_the_top_left_corner_are_the_window() -> None:
    for tile in CASES:
        assert torch.equal(seen(top_left(tile), tile.height, tile.width, 0), pairs(tile)), tile


def test_no_side_is_negative_and_no_limit_is_none() -> None:
    for tile in CASES:
        for size in (bottom_right(tile), top_left(tile)):
            assert all(side is None or side >= 0 for side in size)
        if pairs(tile).all():
            assert bottom_right(tile) == top_left(tile) == WindowSize()


@pytest.mark.parametrize("height", [None, 1, 2, 3])
def test_strips_are_the_window(height: int | None) -> None:
    """Strips as tall as the tile is wide, which are not taller than wide themselves; and lower ones."""
    for tile in CASES:
        found = torch.zeros(tile.height, tile.width, dtype=torch.bool)
        for strip in strips(tile, height or tile.width):
            assert height is not None or strip.height <= strip.width
            unmasked = pairs(strip)
            assert unmasked.any(0).all()
            assert unmasked.any(1).all()
            found[slice(*strip.rows), slice(*strip.cols)] |= unmasked
        assert torch.equal(found, pairs(tile)), tile


def test_a_tile_that_is_not_tall_is_one_strip() -> None:
    tile = AttnTile((0, 4), (0, 6), window=TileWindow(1, 3))
    assert strips(tile, tile.width) == [tile]


@pytest.mark.parametrize(
    ("rows", "cols", "window"), [(4, 6, TileWindow(None, 1)), (6, 4, TileWindow(1, None)), (4, 4, TileWindow(-1, None))]
)
@pytest.mark.parametrize("size_of", [bottom_right, top_left])
def test_windows_that_mask_a_whole_row_or_column_are_an_error(
    size_of: Callable[[AttnTile], WindowSize], rows: int, cols: int, window: TileWindow
) -> None:
    tile = AttnTile((0, rows), (0, cols), window=window)
    assert not all(pairs(tile).any(axis).all() for axis in (0, 1))
    with pytest.raises(WallfacerError, match="masks all pairs of a row or column"):
        size_of(tile)


def test_without_a_window_there_is_no_size() -> None:
    tile = AttnTile((0, 4), (0, 6))
    assert bottom_right(tile) == top_left(tile) == WindowSize()


def test_numbers_are_minus_one_for_no_limit() -> None:
    assert WindowSize(None, 2).numbers == (-1, 2)
    assert WindowSize(3, None).numbers == (3, -1)
