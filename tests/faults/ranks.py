"""Rows: ranks that fail, wait or disagree."""

from __future__ import annotations

from tests.faults.row import SINCE_CHECKPOINT, Row

ROWS: tuple[Row, ...] = (
    Row(
        "a rank raises an exception, under `wallfacer demo`",
        "torchrun ends all ranks; the first failing rank is named",
        "at once",
        "-",
        "`rank 1 failed first, with exit code 1:`",
        SINCE_CHECKPOINT,
        ("tests/cli/test_failing_rank.py",),
    ),
)
