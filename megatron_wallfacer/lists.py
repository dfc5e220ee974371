"""Lists of numbers as they are typed: ``0-3,8``."""

from __future__ import annotations

import re


def numbers_listed(text: str) -> frozenset[int] | None:
    """The numbers; None where they are not written so, or a range runs backwards."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            return None
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)
