"""Rows: wrong arguments, wrong numbers, corrupted data."""

from __future__ import annotations

from tests.faults.row import NOTHING, SINCE_CHECKPOINT, Row

ROWS: tuple[Row, ...] = (
    Row(
        "the command line has an unsupported flag",
        "every rank ends with exit code 2",
        "at start",
        "-",
        "`wallfacer: error: --qk-clip: must be left out`",
        NOTHING,
        ("tests/megatron/test_fails_closed.py::test_rejected_on_every_rank[--qk-clip]",),
    ),
    Row(
        "`attention()` gets a wrong argument",
        "every rank raises the same error before any message is sent, and the next call works",
        "at once",
        "-",
        "`shard_mode=documents: must be one of sequence, per_document`",
        "nothing",
        ("tests/attention/test_arguments.py",),
    ),
    Row(
        "a model or `--spec` names an attention module of Megatron",
        "every rank ends with exit code 2",
        "when the model is built",
        "-",
        "`wallfacer: error: --wallfacer-cp-size: must be left out, because ...`",
        NOTHING,
        ("tests/megatron/test_fails_closed.py::test_a_spec_that_names_megatrons_attention",),
    ),
    Row(
        "`wallfacer run` gets a misspelt flag",
        "the command ends with exit code 2 and launches no rank",
        "before the launch",
        "-",
        "`--seq-lenght: this Megatron has no such flag; did you mean --seq-length?`",
        NOTHING,
        ("tests/cli/test_run.py::test_a_wrong_flag_is_one_line_before_the_launch",),
    ),
    Row(
        "a message arrives with a flipped bit, or with rows in another order",
        "every rank of the context-parallel group raises the same error",
        "at the end of the pass, in a verified step",
        "`--wallfacer-verify-every`",
        "`backward pass of layer 5: dk of rank 2 arrived changed at rank 3 (ring_outer)`",
        SINCE_CHECKPOINT,
        ("tests/engine/test_verify.py", "tests/megatron/test_verified.py"),
    ),
    Row(
        "q, k, v or dO of a rank has values that are not finite",
        "every rank of the context-parallel group raises the same error",
        "before the first message of the pass, in a verified step",
        "`--wallfacer-verify-every`",
        "`forward pass of layer 5: v of rank 2 has values that are not finite`",
        SINCE_CHECKPOINT,
        (
            "tests/engine/test_verify.py::test_what_is_wrong_is_named_on_every_rank",
            "tests/megatron/test_verified.py::test_a_rank_whose_own_value_is_nan_is_named_on_every_rank",
        ),
    ),
)
