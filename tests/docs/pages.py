"""The pages, and the commands in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
_PROGRAM = r"(?:make|wallfacer|torchrun|sbatch|python -[mc]|scripts/\S+|benchmarks/\S+)"
#: Variables may stand before it, the environment's folder in front of it. Output has a colon or columns after the name.
COMMAND = re.compile(r"(?:\w+=(?:\"[^\"]*\"|\S*) +)*(?:\.venv/bin/)?" + _PROGRAM + r"(?: \S|$)")


def blocks(text: str) -> Iterator[list[str]]:
    """Code blocks, fenced or indented by four spaces, as lines."""
    fence: list[str] | None = None
    indented: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.lstrip().startswith("```"):
            if fence:
                yield fence
            fence = [] if fence is None else None
        elif fence is not None:
            fence.append(line)
        elif line.startswith("    "):
            indented.append(line[4:])
        elif indented:
            yield indented
            indented = []


def commands(text: str) -> Iterator[str]:
    """Commands of a page: each one line, without its comment; those of the environment by their bare names."""
    for block in blocks(text):
        joined = re.sub(r" *\\\n\s*", " ", "\n".join(block))
        lines = [re.sub(r"\s+#.*", "", line).rstrip() for line in joined.splitlines()]
        prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        # Where there is a prompt, the rest is output.
        for line in prompted or lines:
            if COMMAND.match(line):
                yield line.replace(".venv/bin/", "")
