"""Parser of lists of numbers on the command line, such as ``0-3,8``."""

from __future__ import annotations

import re


def numbers_listed(text: str) -> frozenset[int] | None:
    """Return the numbers of a list such as ``0-3,8``; None if the text has another form or a range runs backwards."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            return None
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)
