"""docs/errors.md explains messages whose cause is not in their own text; each of them is one that the package makes."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.messages import messages

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
#: By message, its cause and what to do.
ROWS = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", PAGE, flags=re.MULTILINE))


def test_the_page_is_short() -> None:
    """A message names its cause; the page is for the few that cannot."""
    assert 0 < len(ROWS) <= 25


def test_every_row_is_a_message() -> None:
    stale = ROWS.keys() - messages().keys()
    assert not stale, f"docs/errors.md has messages that nothing makes: {sorted(stale)}"


def test_messages_are_found_in_every_form() -> None:
    """One of each: an option, a message with constants, a subclass, a preset's, a flag by its option."""
    assert {
        "bidirectional=...: must be used with a single ring: ring_inner or ring_outer must be 1",
        "--wallfacer-log-metrics: needs --tensorboard-dir DIR or --wandb-project NAME",
        "levels=...: must be a list of {nodes, oversubscription}",
        "...: ...: must occur only once, is already in line ...",
        "--wallfacer-cluster ...: needs --seq-length and --hidden-size on the command line",
    } <= messages().keys()
