"""A cache of prepared forward and backward passes, one per context-parallel group."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

#: Largest number of cached passes. A model has a few passes, but packed documents need new ones in every micro-batch.
CAPACITY = 128
#: Largest number of bytes of cached passes and of cached masks. A pass of 8,000 documents, one call each, has 40 MB.
LIMIT = 256 << 20


class PassCache:
    """A cache that drops its oldest entries first. The newest entry remains even if it is larger than the limit.

    The limit of ``limit`` bytes applies to the cached passes, and again to the values that :meth:`number_of` stores.
    """

    def __init__(self, capacity: int = CAPACITY, limit: int = LIMIT) -> None:
        self._passes, self._numbers = _Bounded(capacity, limit), _Bounded(capacity, limit)
        self._next = 0
        self.get, self.add = self._passes.entries.get, self._passes.add

    def number_of(self, alike: Hashable, nbytes: int = 0) -> int:
        """Return a number that identifies a value. Equal values get the same number. Look-ups hash only the number."""
        number = self._numbers.entries.get(alike)
        if number is None:
            number = self._numbers.add(alike, self._next, nbytes)
            self._next += 1
        return number

    def clear(self) -> None:
        """Drop all entries."""
        self._passes.clear()
        self._numbers.clear()

    def __len__(self) -> int:
        return len(self._passes.entries)


class _Bounded:
    """Entries in the order of insertion, with the bytes of each."""

    def __init__(self, capacity: int, limit: int) -> None:
        self._capacity, self._limit = capacity, limit
        self.entries: dict[Hashable, Any] = {}
        self._sizes: dict[Hashable, int] = {}
        self._held = 0

    def add(self, key: Hashable, entry: Any, nbytes: int = 0) -> Any:
        """Add an entry, and return it."""
        while self.entries and (len(self.entries) == self._capacity or self._held + nbytes > self._limit):
            oldest = next(iter(self.entries))
            del self.entries[oldest]
            self._held -= self._sizes.pop(oldest)
        self.entries[key] = entry
        self._sizes[key] = nbytes
        self._held += nbytes
        return entry

    def clear(self) -> None:
        self.entries.clear()
        self._sizes.clear()
        self._held = 0
