"""A cache that is bounded by bytes: a thousand entries of 65,536 documents each would need gigabytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

Made = TypeVar("Made")
#: Bytes of an integer in a tuple: the pointer, and the integer, if no other object refers to it.
INTEGER_BYTES = 36


def byte_cache(limit: int, nbytes: Callable[..., int]) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Return a decorator like ``functools.lru_cache`` that is bounded by bytes. Arguments must be positional.

    A cached call costs no Python call, as with ``functools.cache``. If an entry would exceed the limit, the cache is
    emptied first. A result larger than the limit is the only entry.

    Args:
        limit: largest number of bytes of all entries.
        nbytes: function that returns the bytes of an entry, given the arguments of the call.
    """

    def decorate(make: Callable[..., Made]) -> Callable[..., Made]:
        held = 0

        @cache
        def cached(*arguments: Any) -> Made:
            nonlocal held
            size = nbytes(*arguments)
            if held + size > limit:
                cached.cache_clear()
                held = 0
            made = make(*arguments)
            held += size
            return made

        return cached

    return decorate
