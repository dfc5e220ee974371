"""The cache of compiled passes of one set of process groups, which is dropped with them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

#: Passes that are kept. A model has a few; packed documents make new ones with every micro-batch.
CAPACITY = 128
#: Bytes of all passes, and of all masks that have a number. A pass of 8,000 documents, one call each, has 40 MB.
LIMIT = 256 << 20


class PassCache:
    """A bounded cache; the oldest entry goes first. The newest is kept even if it is larger than the limit.

    Args:
        capacity: entries that are kept.
        limit: bytes of all entries.
    """

    def __init__(self, capacity: int = CAPACITY, limit: int = LIMIT) -> None:
        self._passes, self._numbers = _Bounded(capacity, limit), _Bounded(capacity, limit)
        self._next = 0
        self.get = self._passes.entries.get

    def number_of(self, alike: Hashable, nbytes: int = 0) -> int:
        """Return one number for equal values, so that a warm lookup hashes no plan and no mask.

        Args:
            alike: value.
            nbytes: bytes that the value keeps.
        """
        number = self._numbers.entries.get(alike)
        if number is None:
            number = self._next
            self._next += 1
            self._numbers.add(alike, number, nbytes)
        return number

    def add(self, key: Hashable, compiled: Any, nbytes: int = 0) -> Any:
        """Keep a compiled pass, and return it.

        Args:
            key: key of the pass.
            compiled: compiled pass.
            nbytes: bytes of the pass.
        """
        self._passes.add(key, compiled, nbytes)
        return compiled

    def clear(self) -> None:
        """Drop all entries."""
        self._passes.clear()
        self._numbers.clear()

    def __len__(self) -> int:
        return len(self._passes.entries)


class _Bounded:
    """Entries in the order in which they came, with the bytes of each."""

    def __init__(self, capacity: int, limit: int) -> None:
        self._capacity, self._limit = capacity, limit
        self.entries: dict[Hashable, Any] = {}
        self._sizes: dict[Hashable, int] = {}
        self._held = 0

    def add(self, key: Hashable, entry: Any, nbytes: int) -> None:
        while self.entries and (len(self.entries) == self._capacity or self._held + nbytes > self._limit):
            oldest = next(iter(self.entries))
            del self.entries[oldest]
            self._held -= self._sizes.pop(oldest)
        self.entries[key] = entry
        self._sizes[key] = nbytes
        self._held += nbytes

    def clear(self) -> None:
        self.entries.clear()
        self._sizes.clear()
        self._held = 0
