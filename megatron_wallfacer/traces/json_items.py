"""Where an item of a JSON file stands: values have no line numbers once they are read."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_wallfacer.input_files import JSON_BYTES, read_text

_SPACE = re.compile(r"[ \t\n\r]*")


def item_line(path: Path, name: str, index: int | None = None) -> int:
    """Return the line at which an item begins, 1 where there is none.

    Args:
        path: of a file that holds an object, and has been read as JSON.
        name: key of the item.
        index: of the element, where the item is a list; None for the item itself.
    """
    text = read_text(path, JSON_BYTES)
    try:
        position = _after(text, _space(text, 0), "{")
        while (key := _value(text, position))[0] != name:
            # Behind the key a colon and a value, behind these a comma.
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


def _space(text: str, position: int) -> int:
    """Where the next token begins."""
    found = _SPACE.match(text, position)
    assert found is not None
    return found.end()


def _after(text: str, position: int, sign: str) -> int:
    """Where the token behind a sign begins."""
    position = _space(text, position)
    if not text.startswith(sign, position):
        raise ValueError(f"no {sign}")
    return _space(text, position + 1)


def _value(text: str, position: int) -> tuple[object, int]:
    """The value that begins here, and where it ends."""
    return json.JSONDecoder().raw_decode(text, position)
