"""Conversion of the window and the document boundaries of a tile to arguments of flash kernels.

A :class:`TileWindow` counts diagonals from the top-left corner. FlashAttention counts from the bottom-right corner:
row i of ``rows`` sees ``left`` columns before column i + cols - rows and ``right`` columns after it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.kernels.byte_cache import INTEGER_BYTES, byte_cache
from megatron_wallfacer.schedule.attn_tile import AttnTile, TileWindow
from megatron_wallfacer.schedule.mask import NO_LIMIT


class WindowSize(NamedTuple):
    """Numbers of columns (left, right) that a row sees before and after its diagonal; None for no limit."""

    left: int | None = None
    right: int | None = None

    @property
    def numbers(self) -> tuple[int, int]:
        """Return (left, right), where -1 stands for no limit."""
        return tuple(NO_LIMIT if side is None else side for side in self)


def bottom_right(tile: AttnTile) -> WindowSize:
    """Convert the window of a tile to FlashAttention's argument ``window_size``.

    If a limit has no effect on the tile, it becomes None. FlashAttention has a faster kernel for no window at all.

    Raises:
        WallfacerError: The window masks a whole row or column of the tile. FlashAttention reads a negative window size
            as no limit.
    """
    (left, right), apart = top_left(tile), tile.width - tile.height
    return WindowSize(None if left is None else left + apart, None if right is None else right - apart)


def top_left(tile: AttnTile) -> WindowSize:
    """Convert the window of a tile to cuDNN's window size, which is counted from the top-left corner.

    Raises:
        WallfacerError: The window masks a whole row or column of the tile.
    """
    if tile.window is None:
        return WindowSize()
    (left, right), height, width = tile.window, tile.height, tile.width
    apart = width - height
    if (left is not None and left < -min(0, apart)) or (right is not None and right < max(0, apart)):
        raise WallfacerError(f"{tile.window} masks all pairs of a row or column of a tile of {height} x {width}")
    return WindowSize(
        None if left is None or left >= height - 1 else left, None if right is None or right >= width - 1 else right
    )


def strips(tile: AttnTile, height: int) -> list[AttnTile]:
    """Divide a tile with a window into tiles of at most ``height`` rows.

    Columns that are masked in all rows of a part are left out of the part. Rows and columns of the parts are numbered
    from the first row and the first column of ``tile``.

    FlashAttention 2 computes wrong results for a tile with more rows than columns. FlashAttention 2 treats ``right >=
    cols`` as no limit. If ``left`` is limited, FlashAttention 2 treats an unlimited ``right`` as ``right = cols``.
    cuDNN does not support a tile with more rows than columns. So for FlashAttention 2 and cuDNN ``height`` must be at
    most the number of columns.
    """
    assert tile.window is not None
    left, right = tile.window
    found = []
    for first in range(0, tile.height, height):
        end = min(first + height, tile.height)
        start = 0 if left is None else max(0, first - left)
        stop = tile.width if right is None else min(tile.width, end + right)
        shift = first - start
        window = TileWindow(None if left is None else left - shift, None if right is None else right + shift)
        found.append(AttnTile((first, end), (start, stop), window=window))
    return found


#: Largest number of bytes of cached boundaries: the tuples, their pinned copies and the tensors.
_LIMIT = 64 << 20


@byte_cache(_LIMIT, lambda boundaries, _: len(boundaries) * (INTEGER_BYTES + 2 * torch.int32.itemsize))
def cu_seqlens_tensor(boundaries: tuple[int, ...], device: torch.device) -> Tensor:
    """Return document boundaries as int32 ``[documents + 1]`` on a device.

    All layers share the cached tensor. The copy to the device is asynchronous.
    """
    made = torch.tensor(boundaries, dtype=torch.int32, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)
