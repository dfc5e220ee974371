"""docs/flags.md has the table that is generated from the flags."""

from __future__ import annotations

from scripts.pages.blocks import regenerated
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "flags.md").read_text()


def test_the_table_is_current() -> None:
    assert regenerated(PAGE) == PAGE, "docs/flags.md is stale: python -m scripts.pages"


def test_a_stale_table_is_found() -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith("| `--wallfacer-kernel "))
    assert regenerated(PAGE.replace(f"{row}\n", "")) == PAGE
    assert regenerated(PAGE.replace(row, row.replace("`auto`", "`te`", 1))) == PAGE
