"""The project's layout and those of the libraries: views where a library takes strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


def swapped(x: Tensor) -> Tensor:
    """sbhd to bshd and back, a view."""
    return x.transpose(0, 1)


def bhsd(x_sbhd: Tensor) -> Tensor:
    """sbhd to bhsd, a view."""
    return x_sbhd.permute(1, 2, 0, 3)


def sbhd(x_bhsd: Tensor) -> Tensor:
    """bhsd to sbhd, a view."""
    return x_bhsd.permute(2, 0, 1, 3)


def lse_sbh(lse_bhs: Tensor) -> Tensor:
    """The lse of a library ``[b, h, s]`` as ours ``[s, b, h]``, a view."""
    return lse_bhs.permute(2, 0, 1)


def lse_bhs(lse_sbh: Tensor) -> Tensor:
    """Our lse ``[s, b, h]`` as the libraries' ``[b, h, s]``: a copy, they read it without looking at strides."""
    return lse_sbh.permute(1, 2, 0).contiguous()


class Layout(NamedTuple):
    """How a library takes tensors and the lse, and gives them back; ``ours`` is sbhd, of the lse sbh."""

    theirs: Callable[[Tensor], Tensor]
    ours: Callable[[Tensor], Tensor]
    lse_theirs: Callable[[Tensor], Tensor]
    lse_ours: Callable[[Tensor], Tensor]
