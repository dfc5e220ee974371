"""docs/errors.md has every error message, with what to do about it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.messages import messages

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
#: Message by message, what to do.
ROWS = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", PAGE, flags=re.MULTILINE))


def test_every_message_has_a_remedy() -> None:
    missing = {message: place for message, place in messages().items() if message not in ROWS}
    assert not missing, "rows that docs/errors.md lacks:\n" + "\n".join(
        f"| `{message}` | WHAT TO DO |   (megatron_wallfacer/{place})" for message, place in missing.items()
    )


def test_every_row_is_a_message() -> None:
    stale = ROWS.keys() - messages().keys()
    assert not stale, f"docs/errors.md has messages that nothing makes: {sorted(stale)}"


def test_messages_are_found_in_every_form() -> None:
    """One of each: an option, a message with constants, a subclass, a preset's, a flag by its option."""
    assert {
        "bidirectional=...: must be a single ring: ring_inner or ring_outer must be 1",
        "--wallfacer-log-metrics: needs --tensorboard-dir DIR or --wandb-project NAME beside it",
        "levels=...: must be a list of {nodes, oversubscription}",
        "...: ...: must occur once, is already in line ...",
        "--wallfacer-cluster ...: needs --seq-length and --hidden-size on the command line",
    } <= messages().keys()
