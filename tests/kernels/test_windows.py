from __future__ import annotations

from itertools import product

import pytest
import torch

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.kernels.reference import live_pairs
from megatron_wallfacer.kernels.windows import Window, bottom_right, strips, top_left
from megatron_wallfacer.schedule.mask import Band

SIZES = ((1, 1), (1, 4), (4, 1), (4, 4), (3, 7), (7, 3), (7, 2))


def bands(rows: int, cols: int) -> list[Band]:
    """All in which each row and each column has a live pair."""
    sides = [None, *range(-rows - 1, cols + 2)]
    found = [Band(lower, upper) for lower, upper in product(sides, sides)]
    return [band for band in found if all(pairs(band, rows, cols).any(axis).all() for axis in (0, 1))]


def pairs(band: Band, rows: int, cols: int) -> torch.Tensor:
    return live_pairs(band, rows, cols, device=torch.device("cpu"))


def seen(window: Window, rows: int, cols: int, first: int) -> torch.Tensor:
    """Pairs of a window if row 0 stands at column ``first``: what the libraries' manuals say."""
    row, col = torch.arange(rows).unsqueeze(-1), torch.arange(cols)
    left = cols + rows if window.left is None else window.left
    right = cols + rows if window.right is None else window.right
    return (col >= row + first - left) & (col <= row + first + right)


CASES = [(rows, cols, band) for rows, cols in SIZES for band in bands(rows, cols)]


def test_there_are_bands_to_try() -> None:
    assert len(CASES) > 150


def test_windows_from_the_bottom_right_corner_are_the_band() -> None:
    for rows, cols, band in CASES:
        window = bottom_right(band, rows, cols)
        assert torch.equal(seen(window, rows, cols, cols - rows), pairs(band, rows, cols)), (rows, cols, band)


def test_windows_from_the_top_left_corner_are_the_band() -> None:
    for rows, cols, band in CASES:
        window = top_left(band, rows, cols)
        assert torch.equal(seen(window, rows, cols, 0), pairs(band, rows, cols)), (rows, cols, band)


def test_no_side_is_negative_and_no_limit_is_none() -> None:
    for rows, cols, band in CASES:
        for window in (bottom_right(band, rows, cols), top_left(band, rows, cols)):
            assert all(side is None or side >= 0 for side in window)
        if pairs(band, rows, cols).all():
            assert bottom_right(band, rows, cols) == top_left(band, rows, cols) == Window()


def test_strips_are_the_band_and_not_tall() -> None:
    for rows, cols, band in CASES:
        found = torch.zeros(rows, cols, dtype=torch.bool)
        for r, c, part in strips(band, rows, cols):
            height, width = r.stop - r.start, c.stop - c.start
            assert height <= width
            live = pairs(part, height, width)
            assert live.any(0).all()
            assert live.any(1).all()
            found[r, c] |= live
        assert torch.equal(found, pairs(band, rows, cols)), (rows, cols, band)


def test_a_tile_that_is_not_tall_is_one_strip() -> None:
    assert list(strips(Band(-1, 3), 4, 6)) == [(slice(0, 4), slice(0, 6), Band(-1, 3))]


@pytest.mark.parametrize(
    ("rows", "cols", "band"), [(4, 6, Band(None, 1)), (6, 4, Band(-1, None)), (4, 4, Band(1, None))]
)
@pytest.mark.parametrize("window", [bottom_right, top_left])
def test_bands_with_dead_rows_or_columns_are_refused(window: object, rows: int, cols: int, band: Band) -> None:
    assert not all(pairs(band, rows, cols).any(axis).all() for axis in (0, 1))
    with pytest.raises(WallfacerError, match="a row or a column has no live pair"):
        window(band, rows, cols)


def test_without_a_band_there_is_no_window() -> None:
    assert bottom_right(None, 4, 6) == top_left(None, 4, 6) == Window()


def test_arguments_say_minus_one_for_no_limit() -> None:
    assert Window(None, 2).arguments(as_pair=True) == {"window_size": (-1, 2)}
    assert Window(3, None).arguments(as_pair=False) == {"window_size_left": 3, "window_size_right": -1}
