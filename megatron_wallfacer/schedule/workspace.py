"""Workspace layouts: offsets for buffers with known lifetimes, so that one allocation contains all buffers.

Buffers that are alive at the same time never overlap. Finding the smallest layout (dynamic storage allocation) is
NP-hard. For every scheme, the greedy layout is a few percent larger than the bytes that are alive at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter

#: Alignment of offsets in bytes. Vector loads of 16 bytes and full memory transactions need it.
ALIGNMENT = 128


@dataclass(frozen=True, slots=True)
class Buffer:
    """One buffer, which is alive from operation ``first`` to operation ``last``, inclusive."""

    key: Hashable
    first: int
    last: int
    nbytes: int


@dataclass(frozen=True)
class WorkspaceLayout:
    """The offset of each buffer in the workspace by key, and the size of the workspace, in bytes."""

    offsets: Mapping[Hashable, int]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _SameLifetime:
    """Buffers that have the same lifetime, and are adjacent in the workspace."""

    first: int
    last: int
    nbytes: int
    buffers: tuple[Buffer, ...]


_ORDERS: tuple[Callable[[_SameLifetime], tuple[int, ...]], ...] = (
    lambda group: (-group.nbytes, group.first),
    lambda group: (group.first, -group.nbytes),
)


def arrange(buffers: Iterable[Buffer]) -> WorkspaceLayout:
    """Place buffers in one workspace. Buffers that are not alive at the same time may share bytes.

    The result is the smaller of two greedy layouts. One places the largest buffers first, and the other places buffers
    in the order of first use. Each buffer gets the smallest gap that is large enough.
    """
    groups = _by_lifetime(buffers)
    return min((_layout(sorted(groups, key=order)) for order in _ORDERS), key=attrgetter("nbytes"))


def aligned(nbytes: int) -> int:
    """Return a size in bytes, rounded up to the next multiple of :data:`ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _by_lifetime(buffers: Iterable[Buffer]) -> list[_SameLifetime]:
    groups: dict[tuple[int, int], list[Buffer]] = {}
    for buffer in buffers:
        groups.setdefault((buffer.first, buffer.last), []).append(buffer)
    return [
        _SameLifetime(first, last, sum(aligned(buffer.nbytes) for buffer in same), tuple(same))
        for (first, last), same in groups.items()
    ]


def _layout(groups: Iterable[_SameLifetime]) -> WorkspaceLayout:
    placed: list[tuple[int, _SameLifetime]] = []
    offsets: dict[Hashable, int] = {}
    size = 0
    for group in groups:
        offset = _tightest_gap(group, placed)
        placed.append((offset, group))
        size = max(size, offset + group.nbytes)
        for buffer in group.buffers:
            offsets[buffer.key] = offset
            offset += aligned(buffer.nbytes)
    return WorkspaceLayout(offsets, size)


def _tightest_gap(group: _SameLifetime, placed: Iterable[tuple[int, _SameLifetime]]) -> int:
    """Return the offset of the smallest gap that is large enough; if there is none, the end of all buffers.

    Placed buffers that are not alive at the same time as ``group`` are ignored.
    """
    occupied = sorted(
        (offset, offset + other.nbytes)
        for offset, other in placed
        if other.first <= group.last and group.first <= other.last
    )
    best, smallest, end = None, 0, 0
    for start, stop in occupied:
        gap = start - end
        if gap >= group.nbytes and (best is None or gap < smallest):
            best, smallest = end, gap
        end = max(end, stop)
    return end if best is None else best
