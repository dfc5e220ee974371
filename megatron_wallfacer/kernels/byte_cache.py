"""A cache of results that is bounded by bytes: a thousand entries of 65,536 documents each would be gigabytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

Made = TypeVar("Made")
#: Bytes of an integer in a tuple: its pointer, and the integer itself, which nothing else may hold.
INTEGER_BYTES = 36


def byte_cache(limit: int, nbytes: Callable[..., int]) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Return a decorator as ``functools.lru_cache``, for positional arguments, bounded by bytes.

    A warm call is that of ``lru_cache``, which is no Python call. Before the limit is passed the cache is emptied; a
    result larger than the limit is kept alone.

    Args:
        limit: bytes of all entries.
        nbytes: bytes of an entry, from the arguments of the call.
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
