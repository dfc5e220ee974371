"""The documentation stays short enough to be read: words of what is written by hand, tables and commands included."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT

#: Pages that are made of a table in the code, or keep what is superseded.
NOT_COUNTED = ("CHANGELOG.md", "archive.md", "flags.md", "unsupported.md")
LARGEST_PAGE, LARGEST_SUM = 2000, 22_000
#: Blocks that commands print or write: schedules, tables between comments, output below a prompt, a shown file.
GENERATED = (
    r"<!-- schedule: .*?-->\n```text\n.*?^```$",
    r"<!-- rows of .*?<!-- end of rows -->",
    r"<!-- versions: written.*?<!-- versions: end -->",
    r"<!-- printed by .*?<!-- end -->",
    r"^```(?:text\n|\n\$ ).*?^```$",
    r"^```python\n.*?^```$",
    r"^\| P \| 1K tokens per rank .*?\n\n",
    r"^\| model \| H100 \| tokens .*?\n\n",
)


def words(text: str) -> int:
    """Return the number of words that are written by hand."""
    for block in GENERATED:
        text = re.sub(block, "\n", text, flags=re.MULTILINE | re.DOTALL)
    return len(text.split())


COUNTS = {page: words(page.read_text()) for page in PAGES if page.name not in NOT_COUNTED}


@pytest.mark.parametrize("page", COUNTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_short(page: Path) -> None:
    assert COUNTS[page] <= LARGEST_PAGE


def test_all_pages_together_are_short() -> None:
    assert sum(COUNTS.values()) <= LARGEST_SUM, {page.name: count for page, count in COUNTS.items()}


def test_generated_blocks_are_not_counted() -> None:
    schedule = "<!-- schedule: team=2, rank 0, forward -->\n```text\na b c\n```\n"
    page = f"two words\n\n{schedule}\n```\n$ wallfacer x\na b\n```\n\n<!-- printed by x -->\na\n<!-- end -->\n"
    assert words(page) == 2
