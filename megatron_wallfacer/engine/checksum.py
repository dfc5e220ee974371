"""A checksum of a tensor that depends on the position of every element, in 64-bit integers on the tensor's device.

A row is the sum of its elements, read as integers, times an odd number for each place in the row; its bits are mixed,
and rows are summed times an odd number for each row. All of it is modulo 2^64. One flipped bit, or any change within
one row that changes the row's sum, always changes the checksum; other changes pass with a probability near 2^-64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
#: Elements that are widened to 64 bits at a time: 32 MiB.
_ELEMENTS = 2**22
_SEEDS = {"row": 1, "place": 2}


def checksum(pieces: Sequence[Tensor]) -> Tensor:
    """Return the checksum of consecutive rows as an int64 scalar; nothing waits for the device.

    Args:
        pieces: ``[rows, ...]`` of equal shapes but for the rows, with any strides.
    """
    device, first = pieces[0].device, 0
    total = torch.zeros((), dtype=torch.int64, device=device)
    places = _odd("place", prod(pieces[0].shape[1:]), device)
    rows = _odd("row", sum(len(piece) for piece in pieces), device)
    for piece in pieces:
        step = max(1, _ELEMENTS // max(1, places.numel()))
        for some in piece.split(step):
            integers = some.reshape(len(some), -1).view(_INTEGERS[some.element_size()])
            sums = torch.mul(integers, places).sum(-1)
            # Without this, changes of several rows could cancel wherever they are multiples of each other.
            sums ^= (sums >> 32) & 0xFFFFFFFF
            total += (sums * rows[first : first + len(some)]).sum()
            first += len(some)
    return total


@lru_cache(maxsize=64)
def _odd(kind: str, length: int, device: torch.device) -> Tensor:
    """Odd pseudo-random numbers, the same on every rank: ``[length]``, int64."""
    generator = torch.Generator().manual_seed(_SEEDS[kind])
    numbers = torch.randint(-(2**62), 2**62, (length,), generator=generator, dtype=torch.int64)
    return ((numbers << 1) | 1).to(device)
