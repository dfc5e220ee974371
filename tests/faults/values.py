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
    Row(
        "a model or `--spec` that names an attention of Megatron's",
        "every rank ends with exit code 2",
        "when the model is built",
        "-",
        "`wallfacer: error: --wallfacer-cp-size: must be left out here`",
        NOTHING,
        ("tests/megatron/test_fails_closed.py::test_a_spec_that_names_megatrons_attention",),
    ),
    Row(
        "a misspelt flag of `wallfacer run`",
        "nothing is launched, exit code 2",
        "before the launch",
        "-",
        "`--seq-lenght: this Megatron has no such flag; did you mean --seq-length?`",
        NOTHING,
        ("tests/cli/test_run.py::test_a_wrong_flag_is_one_line_before_the_launch",),
    ),
)
