"""Rows: files, folders, signals, restarts, Slurm."""

from __future__ import annotations

from tests.faults.row import NOTHING, SINCE_CHECKPOINT, Row

_HOSTILE = "tests/test_input_files.py"
_STORAGE = "tests/megatron/test_storage.py"
_VALUES = "tests/slurm/test_values.py"

ROWS: tuple[Row, ...] = (
    Row(
        "a preset, cluster file, trace or benchmark setting with NaN, a key twice, 500 levels, a tag, an alias",
        "the command or the training ends before it starts anything",
        "below 2 s",
        "-",
        "`mine.yaml:3: device.tflops=nan: must be a positive number`",
        NOTHING,
        (f"{_HOSTILE}::test_a_hostile_file_is_one_line_with_its_number",),
    ),
    Row(
        "such a file that is huge, a pipe or a device, or extends others without end",
        "as above, within 500 MB",
        "below 2 s",
        "-",
        "`mine.yaml:1: must be at most 65536 bytes`",
        NOTHING,
        (
            f"{_HOSTILE}::test_what_is_no_regular_file_is_not_read",
            f"{_HOSTILE}::test_files_that_extend_one_another_many_times",
            f"{_HOSTILE}::test_memory_stays_below_500_mb",
        ),
    ),
    Row(
        "the folder of `--wallfacer-timeline` cannot be written at the start",
        "the rank ends before it makes groups, and torchrun ends the others",
        "at start",
        "-",
        "`--wallfacer-timeline /proc/x: cannot be written: No such file or directory`",
        NOTHING,
        (
            "tests/megatron/test_timeline.py::test_a_folder_that_cannot_be_written_is_named_at_the_start",
            f"{_STORAGE}::test_a_folder_that_cannot_be_written_ends_every_rank_at_the_start",
        ),
    ),
    Row(
        "a time line or metrics cannot be written in mid-run",
        "one warning; the output is switched off, training goes on",
        "at once",
        "-",
        "`warning: --wallfacer-log-metrics is switched off: No space left on device`",
        "the output",
        (
            "tests/megatron/test_timeline.py::test_a_trace_that_cannot_be_written_does_not_end_the_run",
            "tests/megatron/test_timeline.py::test_metrics_that_fail_are_switched_off_with_one_warning",
            f"{_STORAGE}::test_a_timeline_whose_folder_goes_in_mid_run_is_switched_off",
        ),
    ),
    Row(
        "a checkpoint cannot be written in mid-run",
        "the rank ends with Megatron's error, and the launcher ends the others",
        "when the checkpoint is written",
        "-",
        "`OSError: [Errno 28] No space left on device`",
        SINCE_CHECKPOINT,
        (f"{_STORAGE}::test_a_checkpoint_that_cannot_be_written_ends_the_job",),
    ),
    Row(
        "an output of `plan`, `view`, `trace`, `tune` cannot be written",
        "the command ends before its work",
        "below 2 s",
        "-",
        "`--save /proc/x: cannot be written: No such file or directory`",
        "nothing",
        ("tests/cli/test_main.py::test_outputs_are_checked_before_the_work",),
    ),
    Row(
        "a rank dies under `torchrun --max-restarts`, over gloo",
        "torchrun starts all ranks again, which go on from the checkpoint; presets set "
        "`TORCH_DISABLE_SHARE_RDZV_TCP_STORE`, elsewhere the second attempt fails without it",
        "at once",
        "-",
        "torchrun's own",
        SINCE_CHECKPOINT,
        ("tests/presets/test_restarts.py", "tests/presets/test_launch.py::test_restarts_have_a_store_of_their_own"),
    ),
    Row(
        "the corpus in the cache of `wallfacer demo` is damaged",
        "it is written again",
        "before the launch",
        "-",
        "-",
        "nothing",
        ("tests/training_runs/test_corpus.py::test_a_damaged_corpus_is_written_again",),
    ),
    Row(
        "Slurm: ranks, checkpoint writers or ports of an earlier job are left on a node",
        "preflight names them, and ends none",
        "before training",
        "-",
        "`preflight: node7: note: left over: process 4711, rank 5 of job 17: ...`",
        "nothing",
        ("tests/slurm/test_preflight.py::test_what_an_earlier_job_left_is_named_and_lives_on",),
    ),
    Row(
        "Slurm: a number that is none, in a variable, preset, flag, the run folder or the output of scontrol",
        "the batch script ends; nothing is evaluated, in a dry run neither",
        "at start",
        "-",
        "`SAVE_INTERVAL=08: must be a whole number from 0 to 999999999`",
        NOTHING,
        (_VALUES,),
    ),
)
