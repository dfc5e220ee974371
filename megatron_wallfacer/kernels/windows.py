"""Bands as the window sizes of flash kernels.

A band counts diagonals (column - row) from the top left corner. FlashAttention counts from the bottom right one: row i
of ``rows`` stands at column i + cols - rows, and sees ``left`` columns before that and ``right`` after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.schedule.mask import NO_LIMIT, Band


class Window(NamedTuple):
    """Columns that a row sees before and after its own; None is no limit."""

    left: int | None = None
    right: int | None = None

    @property
    def numbers(self) -> tuple[int, int]:
        """The same with -1 for no limit."""
        return tuple(NO_LIMIT if side is None else side for side in self)

    def arguments(self, *, as_pair: bool) -> dict[str, Any]:
        """As FlashAttention 2 and 3 take it: ``window_size``, or a parameter for each side."""
        if as_pair:
            return {"window_size": self.numbers}
        return dict(zip(("window_size_left", "window_size_right"), self.numbers, strict=True))


def bottom_right(band: Band | None, rows: int, cols: int) -> Window:
    """The window that FlashAttention takes for a band of a tile.

    Sides that limit nothing are None, so that the faster kernel without a window is taken.

    Raises:
        WallfacerError: a row or a column has no live pair; the window would be negative, which means no limit.
    """
    if band is None:
        return Window()
    _check(band, rows, cols)
    apart = cols - rows
    left = None if band.lower is None or band.lower <= 1 - rows else apart - band.lower
    right = None if band.upper is None or band.upper >= cols - 1 else band.upper - apart
    return Window(left, right)


def top_left(band: Band | None, rows: int, cols: int) -> Window:
    """The same for kernels that count from the top left corner, as cuDNN does.

    Raises:
        WallfacerError: as :func:`bottom_right`.
    """
    if band is None:
        return Window()
    _check(band, rows, cols)
    left = None if band.lower is None or band.lower <= 1 - rows else -band.lower
    return Window(left, None if band.upper is None or band.upper >= cols - 1 else band.upper)


def strips(band: Band, rows: int, cols: int) -> Iterator[tuple[slice, slice, Band]]:
    """A band of a tile in strips that are not taller than wide: (rows, columns, the band of the strip).

    In taller ones FlashAttention 2 takes ``right >= cols`` for no limit and, where left is limited, no limit for
    ``right = cols``; both are wrong there. cuDNN takes none. As for any band, each row and column has a live pair.
    """
    for first in range(0, rows, cols):
        end = min(first + cols, rows)
        lower, upper = (None if side is None else side + first for side in (band.lower, band.upper))
        start = 0 if lower is None else max(0, lower)
        limits = (None if side is None else side - start for side in (lower, upper))
        yield slice(first, end), slice(start, cols), Band(*limits)


def _check(band: Band, rows: int, cols: int) -> None:
    apart = cols - rows
    too_low = band.lower is not None and band.lower > min(0, apart)
    too_high = band.upper is not None and band.upper < max(0, apart)
    if too_low or too_high:
        raise WallfacerError(f"{band} of a tile of {rows} x {cols}: a row or a column has no live pair")
