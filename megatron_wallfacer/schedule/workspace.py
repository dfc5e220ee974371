"""Workspace: offsets for buffers whose lifetimes are known, so that one allocation holds them all.

Buffers that are alive at the same time never overlap. Finding the smallest such arrangement is NP-hard (dynamic storage
allocation); the two greedy orders here come within a few percent of the bytes alive at once for every scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter

#: Offsets are multiples of it: what vector loads of 16 bytes and full memory transactions need.
ALIGNMENT = 128


@dataclass(frozen=True, slots=True)
class Buffer:
    """One buffer to place.

    Attributes:
        key: identifies the buffer in the result.
        first, last: steps between which it is alive, both included.
        nbytes: its size.
    """

    key: Hashable
    first: int
    last: int
    nbytes: int


@dataclass(frozen=True)
class Placement:
    """Where each buffer lies.

    Attributes:
        offsets: bytes from the start of the workspace, by key.
        nbytes: size of the workspace.
    """

    offsets: Mapping[Hashable, int]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Bundle:
    """Buffers with the same lifetime, placed side by side."""

    first: int
    last: int
    nbytes: int
    buffers: tuple[Buffer, ...]


_ORDERS: tuple[Callable[[_Bundle], tuple[int, ...]], ...] = (
    lambda bundle: (-bundle.nbytes, bundle.first),
    lambda bundle: (bundle.first, -bundle.nbytes),
)


def place(buffers: Iterable[Buffer]) -> Placement:
    """Return the smaller of two greedy placements: largest buffers first, and in order of birth.

    Each buffer takes the tightest gap between those that are alive at the same time.
    """
    bundles = _bundles(buffers)
    return min((_place(sorted(bundles, key=order)) for order in _ORDERS), key=attrgetter("nbytes"))


def aligned(nbytes: int) -> int:
    """Return the size rounded up to the next multiple of the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _bundles(buffers: Iterable[Buffer]) -> list[_Bundle]:
    by_life: dict[tuple[int, int], list[Buffer]] = {}
    for buffer in buffers:
        by_life.setdefault((buffer.first, buffer.last), []).append(buffer)
    return [
        _Bundle(first, last, sum(aligned(buffer.nbytes) for buffer in same), tuple(same))
        for (first, last), same in by_life.items()
    ]


def _place(bundles: Iterable[_Bundle]) -> Placement:
    placed: list[tuple[int, _Bundle]] = []
    offsets: dict[Hashable, int] = {}
    size = 0
    for bundle in bundles:
        at = _tightest_gap(bundle, placed)
        placed.append((at, bundle))
        size = max(size, at + bundle.nbytes)
        for buffer in bundle.buffers:
            offsets[buffer.key] = at
            at += aligned(buffer.nbytes)
    return Placement(offsets, size)


def _tightest_gap(bundle: _Bundle, placed: Iterable[tuple[int, _Bundle]]) -> int:
    """Offset of the smallest gap that holds the bundle; above all others where no gap does."""
    beside = sorted(
        (at, at + other.nbytes) for at, other in placed if other.first <= bundle.last and bundle.first <= other.last
    )
    best, smallest, end = None, 0, 0
    for start, stop in beside:
        gap = start - end
        if gap >= bundle.nbytes and (best is None or gap < smallest):
            best, smallest = end, gap
        end = max(end, stop)
    return end if best is None else best
