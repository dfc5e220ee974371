"""Find the line numbers of items in a JSON file, which parsed values do not have."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_wallfacer.input_files import JSON_BYTES, read_text

_SPACE = re.compile(r"[ \t\n\r]*")


def item_line(path: Path, name: str, index: int | None = None) -> int:
    """Return the line on which an item of a JSON object begins, or 1 if the file has no such item.

    An index selects an element of an item that is a list.
    """
    text = read_text(path, JSON_BYTES)
    try:
        position = _after(text, _skip_space(text, 0), "{")
        while (key := _value(text, position))[0] != name:
            # Skip a colon, the value and a comma.
            _, end = _value(text, _after(text, key[1], ":"))
            position = _after(text, end, ",")
        position = _after(text, key[1], ":")
        if index is not None:
            position = _after(text, position, "[")
            for _ in range(index):
                position = _after(text, _value(text, position)[1], ",")
    except ValueError:  # no object, no such key, no such element
        return 1
    return text.count("\n", 0, position) + 1


def _skip_space(text: str, position: int) -> int:
    """Return the position of the next token."""
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _after(text: str, position: int, sign: str) -> int:
    """Return the position of the token after a sign."""
    position = _skip_space(text, position)
    if not text.startswith(sign, position):
        raise ValueError(f"no {sign}")
    return _skip_space(text, position + 1)


def _value(text: str, position: int) -> tuple[object, int]:
    """Return the value at a position, and the position of its end."""
    return json.JSONDecoder().raw_decode(text, position)
