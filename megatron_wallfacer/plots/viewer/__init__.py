"""Build an HTML page that steps through the schedules of a grid: transfers between ranks, and computed chunk pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Any


def page_html(data: Mapping[str, Any]) -> str:
    """Return the complete page."""
    parts = files(__package__)
    # A "<" in the data could end the script element.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return Template((parts / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{data['scheme']} on {data['ranks']} ranks"),
        style=(parts / "page.css").read_text(encoding="utf-8"),
        script=(parts / "page.js").read_text(encoding="utf-8"),
        data=text,
    )
