"""The page as one file: template, style, script and data put together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Any


def page_html(data: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        data: from :func:`megatron_wallfacer.plots.viewer.data.page_data`.
    """
    parts = files(__package__)
    # A "<" inside a script could end it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return Template((parts / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{data['scheme']} on {data['ranks']} ranks"),
        style=(parts / "page.css").read_text(encoding="utf-8"),
        script=(parts / "page.js").read_text(encoding="utf-8"),
        data=text,
    )
