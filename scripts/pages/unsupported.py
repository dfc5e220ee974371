"""Tables of docs/unsupported.md: one row per unsupported combination."""

from __future__ import annotations

import re

from megatron_wallfacer.megatron.combination import When
from megatron_wallfacer.megatron.unsupported import UNSUPPORTED

#: Context-parallel size of the examples.
CP_SIZE = 8


def combination_rows(when: When) -> str:
    """Return a table of the combinations that are checked at one time, as Markdown."""
    head = ("| given | the flag must | because | use instead |", "| --- | --- | --- | --- |")
    rows = (
        f"| `{one.example}` | {_code(one.allowed(CP_SIZE))} | {_code(one.reason)} | {_code(one.instead)} |"
        for one in UNSUPPORTED
        if when == one.when[0] or (when == "model" and when in one.when)
    )
    return "\n".join((*head, *rows))


def _code(text: str) -> str:
    """Return a text with its flags and names marked as code."""
    return re.sub(r"(--[\w-]+(?: [\d,.]+)?|\b[a-z]+(?:_[a-z0-9]+)+\b)", r"`\1`", text)
