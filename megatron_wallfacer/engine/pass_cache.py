"""Compiled passes of one set of process groups: made once, found by sizes, dropped with the groups."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

#: Passes that are kept. A model has a few; packed documents make new ones with every micro-batch.
CAPACITY = 128


class PassCache:
    """A bounded cache; the oldest entry goes first.

    Args:
        capacity: entries that are kept.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._passes: dict[Hashable, Any] = {}
        self._numbers: dict[Hashable, int] = {}
        self._next = 0
        self.get = self._passes.get

    def number_of(self, alike: Hashable) -> int:
        """Return one number for equal values, so that a warm lookup hashes no plan and no mask."""
        if alike not in self._numbers:
            if len(self._numbers) == self._capacity:
                del self._numbers[next(iter(self._numbers))]
            self._numbers[alike] = self._next
            self._next += 1
        return self._numbers[alike]

    def add(self, key: Hashable, compiled: Any) -> Any:
        """Keep a compiled pass, and return it."""
        if len(self._passes) == self._capacity:
            del self._passes[next(iter(self._passes))]
        self._passes[key] = compiled
        return compiled

    def clear(self) -> None:
        """Drop all entries."""
        self._passes.clear()
        self._numbers.clear()

    def __len__(self) -> int:
        return len(self._passes)
