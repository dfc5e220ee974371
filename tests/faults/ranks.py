"""Rows: ranks that fail, wait or disagree."""

from __future__ import annotations

from tests.faults.row import NOT_TRIED, NOTHING, SINCE_CHECKPOINT, Row

_FILE = "tests/megatron/agreement/test_start.py"
_START = f"{_FILE}::test_every_rank_ends_with_a_line_for_the_setting"
_PARSED = "tests/megatron/agreement/test_parsed.py"
_WATCH = "tests/engine/waits/test_watch.py"
_HANG = f"{_WATCH}::test_ranks_name_the_one_that_is_late_and_the_one_that_is_stopped"
_EXCHANGE = "tests/engine/agreement/test_exchange.py"

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
    Row(
        "ranks with different flags, of Megatron or the plugin, or a rank without the plugin",
        "every rank ends with exit code 2 before Megatron makes groups; one line per setting",
        "at start, below 1 s",
        "-",
        "`rank 2 has --wallfacer-head-groups 2, ranks 0, 1, 3 have 1`",
        NOTHING,
        (
            _START,
            f"{_FILE}::test_twelve_settings_on_four_ranks_have_a_line_each",
            f"{_PARSED}::test_a_different_argument_is_an_error",
            f"{_PARSED}::test_a_rank_without_the_plugin_is_compared",
        ),
    ),
    Row(
        "ranks with the same flags but another cluster file, communicator file, resolved plan, code or library",
        "as above",
        "at start, below 1 s",
        "-",
        "`rank 2 has transformer-engine 2.9, ranks 0, 1, 3 have 2.8`",
        NOTHING,
        (
            f"{_PARSED}::test_files_are_compared_by_content",
            f"{_PARSED}::test_the_resolved_plan_is_compared_where_arguments_are_equal",
            f"{_PARSED}::test_software",
        ),
    ),
    Row(
        "ranks with different paths, or another label of the same code",
        "rank 0 prints a warning",
        "at start",
        "-",
        "`warning: rank 1 has --save /b, rank 0 has /a`",
        "nothing",
        (f"{_PARSED}::test_a_different_path_is_a_warning", f"{_PARSED}::test_software"),
    ),
    Row(
        "a rank starts late",
        "it is named; the others wait for it",
        "20 s",
        "-",
        "`rank 3 has not started after 20 s; the others wait`",
        "nothing",
        (f"{_EXCHANGE}::test_a_late_rank_is_named_and_waited_for", f"{_EXCHANGE}::test_a_late_first_rank_is_named"),
    ),
    Row(
        "a rank never starts",
        "every other rank ends with exit code 2",
        "10 minutes, the timeout of process groups",
        "`--distributed-timeout-minutes`",
        "`rank 3 has not started after 600 s, the timeout of process groups`",
        NOTHING,
        (f"{_EXCHANGE}::test_a_rank_that_never_comes_fails_the_job_at_the_timeout",),
    ),
    Row(
        "a rank is killed, over gloo",
        "the others raise: in attention with the rank that is gone, elsewhere gloo's error; the launcher ends the rest",
        "at once",
        "-",
        "`rank 0 lost its connection to rank 1 (ring_outer) in the forward pass of layer 2: RuntimeError: ...`",
        SINCE_CHECKPOINT,
        ("tests/megatron/test_killed.py",),
    ),
    Row(
        "a rank raises in a pass of attention (out of memory, an interrupt), over gloo",
        "ranks that wait for it raise its error; later calls are rejected until `forget_groups()`",
        "at once",
        "-",
        "`rank 1 failed in the forward pass of layer 7: OutOfMemoryError: ...`",
        SINCE_CHECKPOINT,
        ("tests/engine/test_failures.py",),
    ),
    Row(
        "a rank raises in a pass of attention, over NCCL",
        "the launcher ends the others when it ends; a rank that stays is ended by NCCL's watchdog",
        "at once; else the group's timeout",
        "`--distributed-timeout-minutes`",
        "the rank's own error",
        SINCE_CHECKPOINT,
        NOT_TRIED,
    ),
    Row(
        "a rank is slow, or hangs outside of attention",
        "every rank that waits for it, directly or not, prints its own wait and names that rank, its host and its line",
        "60 s",
        "`WALLFACER_WAIT_S`, or SIGQUIT to any rank",
        "`rank 3, layer 12 backward: no dK, dV from rank 2 (ring_outer) for 60 s`",
        "nothing, unless the timeout of process groups ends the job",
        (_HANG, f"{_WATCH}::test_a_long_wait_is_explained_once_with_its_cause", "tests/engine/waits/test_explain.py"),
    ),
    Row(
        "a rank is stopped, or its node is cut off",
        "as above",
        "60 s",
        "`WALLFACER_WAIT_S`, or SIGQUIT to any rank",
        "`rank 2 waits for rank 1 on n17, which has given no sign of life for 31 s`",
        SINCE_CHECKPOINT,
        (_HANG, f"{_WATCH}::test_a_rank_that_publishes_no_more_is_silent"),
    ),
    Row(
        "a rank hangs on NCCL, whose waits do not block the host",
        "the thread asks the last messages that were started, outside graph capture",
        "60 s",
        "`WALLFACER_WAIT_S`",
        "as above",
        SINCE_CHECKPOINT,
        NOT_TRIED,
    ),
    Row(
        "a layer whose attention differs between ranks, on any pipeline stage, after the model is built",
        "every rank ends with exit code 2; only ranks that hold the layer are compared",
        "before the first step",
        "-",
        "`layer 7: rank 3 has window 200,0, rank 2 has 100,0`",
        NOTHING,
        ("tests/megatron/agreement/test_layers.py",),
    ),
    Row(
        "ranks call `attention()` with different arguments, or one rejects its own, in the first 64 calls of a group",
        "every rank of the group raises; later calls are not compared",
        "at once",
        "-",
        "`attention(), call 3: rank 1 has window_size (3, 0), rank 0 has (-1, -1)`",
        "the script's",
        ("tests/engine/agreement/test_calls.py",),
    ),
    Row(
        "a rank raises in the checks of `attention()` (a TypeError, an interrupt), in the first 64 calls of a group",
        "every rank of the group raises; nothing was sent, the next call works",
        "at once; up to 5 s where other ranks are late",
        "-",
        "`attention(), call 2: rank 2 failed before its first message: TypeError: ...`",
        "the script's",
        ("tests/attention/test_failing_checks.py::test_in_the_first_calls_every_rank_names_the_cause",),
    ),
    Row(
        "the same in a later call, or while calls are compared, over gloo",
        "ranks that wait for messages raise its error; later calls are rejected until `forget_groups()`",
        "at once",
        "-",
        "`rank 1 failed before a pass: KeyboardInterrupt`",
        "the script's",
        (
            "tests/attention/test_failing_checks.py::test_in_later_calls_ranks_that_wait_for_messages_name_the_cause",
            "tests/attention/test_failing_checks.py::test_a_rank_that_is_interrupted_while_calls_are_compared",
        ),
    ),
    Row(
        "a rank fails under Slurm",
        "the summary begins with the first failure that is not SIGTERM: rank, node, error, the `--exclude` to type",
        "at once",
        "-",
        "`rank 9 on node17 failed first, with exit code 1:`",
        SINCE_CHECKPOINT,
        (
            "tests/slurm/test_summary.py",
            "tests/slurm/test_attempt.py::test_a_failure_is_shown_and_followed_by_a_requeue",
        ),
    ),
)
