"""Launches of Triton kernels with little host time.

``kernel[grid](...)`` looks up the compiled kernel in every call, by a key of all arguments. This look-up takes as much
host time as slicing a tensor 14 times. A launch without the look-up takes as much host time as slicing a tensor twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

#: First release whose compiled kernels accept constants among their arguments.
_TAKES_CONSTANTS = 3, 3


class Launch:
    """Launches of one kernel on one grid. All launches must have the same constants and argument types.

    The same arguments must be divisible by 16 in all launches.

    Attributes:
        run: function that launches the kernel on the current stream, given all kernel arguments by position.
    """

    run: Callable[..., None]

    def __init__(self, kernel: Any, grid: tuple[int, ...]) -> None:
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self.run = self._first

    def _first(self, *arguments: Any) -> None:
        compiled = self._kernel[self._grid](*arguments)
        # Triton's interpreter returns None.
        if compiled is not None and _release() >= _TAKES_CONSTANTS:
            self.run = compiled[self._grid]


def _release() -> tuple[int, ...]:
    return tuple(map(int, triton.__version__.split(".")[:2]))
