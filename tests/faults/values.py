"""Rows: wrong arguments, wrong numbers, corrupted data."""

from __future__ import annotations

from tests.faults.row import NOTHING, Row

ROWS: tuple[Row, ...] = (
    Row(
        "an unsupported flag",
        "every rank ends with exit code 2",
        "at start",
        "-",
        "`wallfacer: error: --qk-clip: must be left out`",
        NOTHING,
        ("tests/megatron/test_fails_closed.py::test_refused_on_every_rank[--qk-clip]",),
    ),
    Row(
        "a wrong argument of `attention()`",
        "every rank raises the same error before the first message; the next call works",
        "at once",
        "-",
        "`cut=documents: must be one of sequence, document`",
        "nothing",
        ("tests/attention/test_arguments.py",),
    ),
)
