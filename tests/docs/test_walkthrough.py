"""The schedules of docs/walkthrough.md are those that the engine runs, and its loop is the example's."""

from __future__ import annotations

import pytest

from megatron_wallfacer.schedule.grid import Grid
from scripts.pages.blocks import PAGES, regenerated
from scripts.pages.schedules import schedule_text
from tests.docs.pages import ROOT


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_blocks_are_current(page: object) -> None:
    text = page.read_text()
    assert regenerated(text) == text, f"{page.name} is stale: python -m scripts.pages"


def test_a_stale_block_is_found() -> None:
    page = (ROOT / "docs" / "walkthrough.md").read_text()
    stale = page.replace("SendRecv    ring_outer", "Broadcast   ring_outer", 1)
    assert stale != page
    assert regenerated(stale) == page


def test_a_page_without_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match="no block"):
        regenerated("# A page\n")


def test_the_loop_of_the_page_is_the_example() -> None:
    example = (ROOT / "examples" / "ring_in_40_lines.py").read_text()
    page = (ROOT / "docs" / "walkthrough.md").read_text()
    (shown,) = [block for block in page.split("```")[1::2] if block.startswith("python\n")]
    assert shown.removeprefix("python\n") in example


def test_every_operation_has_a_line() -> None:
    """Each of the seven operations appears in some schedule at P = 4."""
    grids = [Grid(ring_outer=4), Grid(team=2, ring_outer=2)]
    text = "\n".join(schedule_text(grid, 1, backward=backward) for grid in grids for backward in (False, True))
    names = {line.split()[1] for line in text.splitlines() if line[:3].strip().isdigit()}
    assert names == {"View", "Concat", "PostRecv", "SendRecv", "Attend", "Accumulate", "WriteResult"}
