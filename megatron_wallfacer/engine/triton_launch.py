"""Launches of Triton kernels with little host time.

``kernel[grid](...)`` looks for the compiled kernel in every call, by a key of all arguments: that takes as long as 14
slices of a tensor. What it returns takes the same arguments and is launched in the time of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

#: From this release on a compiled kernel takes constants in their place among its arguments.
_TAKES_CONSTANTS = 3, 3


class Launch:
    """One kernel on one grid, for arguments whose types, constants and divisibility by 16 never change.

    Args:
        kernel: a function under ``triton.jit``.
        grid: number of programs.

    Attributes:
        run: launches the kernel on the current stream; takes all of its arguments, by position.
    """

    run: Callable[..., None]

    def __init__(self, kernel: Any, grid: tuple[int, ...]) -> None:
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self.run = self._first

    def _first(self, *arguments: Any) -> None:
        compiled = self._kernel[self._grid](*arguments)
        # Triton's interpreter returns nothing.
        if compiled is not None and _release() >= _TAKES_CONSTANTS:
            self.run = compiled[self._grid]


def _release() -> tuple[int, ...]:
    return tuple(map(int, triton.__version__.split(".")[:2]))
