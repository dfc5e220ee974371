"""Find the line numbers of items in a JSON file, because Python's parser returns values without line numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_wallfacer.input_files import JSON_BYTES, read_text

#: Function of a text and a position that returns the value at the position, and the position of its end.
_value = json.JSONDecoder().raw_decode


def item_line(path: Path, name: str, index: int | None = None) -> int:
    """Return the line on which an item of a JSON object begins, or 1 if the file has no such item.

    If the item is a list, ``index`` selects one of its elements.
    """
    text = read_text(path, JSON_BYTES)
    try:
        position = _after(text, 0, "{")
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


def _after(text: str, position: int, sign: str) -> int:
    """Return the position of the token after a punctuation character."""
    match = re.compile(rf"[ \t\n\r]*{re.escape(sign)}[ \t\n\r]*").match(text, position)
    if match is None:
        raise ValueError(f"no {sign}")
    return match.end()
