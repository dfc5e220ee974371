"""A cache with a limit in bytes, because 1,000 entries of 65,536 documents each would need gigabytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

Made = TypeVar("Made")
#: Bytes of an integer in a tuple: 8 for the pointer, and 28 for an integer that no other object refers to.
INTEGER_BYTES = 36


def byte_cache(limit: int, nbytes: Callable[..., int]) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Return a decorator like ``functools.lru_cache`` whose limit is in bytes.

    Functions with this decorator take no keyword arguments.

    A cached result is returned without a call of a Python function, as with ``functools.cache``. If an entry would
    exceed the limit, the cache is emptied first. So a result that is larger than the limit is cached alone. ``nbytes``
    takes the arguments of a cached call, and returns the bytes of the entry.
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
