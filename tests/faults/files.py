"""Rows: files, folders, signals, restarts, Slurm."""

from __future__ import annotations

from tests.faults.row import NOTHING, SINCE_CHECKPOINT, Row

_HOSTILE = "tests/test_input_files.py"
_STORAGE = "tests/megatron/test_storage.py"
_VALUES = "tests/slurm/test_values.py"

ROWS: tuple[Row, ...] = (
    Row(
        "a preset, cluster file, trace or benchmark setting has NaN, duplicate keys, deep nesting, or a YAML tag",
        "the command or the training job ends before it starts any work",
        "below 2 s",
        "-",
        "`mine.yaml:3: device.tflops=nan: must be a positive number`",
        NOTHING,
        (f"{_HOSTILE}::test_a_hostile_file_is_one_line_with_its_number",),
    ),
    Row(
        "a preset or cluster file is larger than the limit, is a pipe or a device, or extends other files without end",
        "the command or the training job ends before it starts any work, and uses at most 500 MB",
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
        "the rank ends before it creates process groups, and torchrun ends the other ranks",
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
        "a timeline or metrics cannot be written during training",
        "the rank prints one warning, switches the output off and continues to train",
        "at once",
        "-",
        "`warning: --wallfacer-log-metrics is switched off: No space left on device`",
        "the timeline or the metrics",
        (
            "tests/megatron/test_timeline.py::test_a_trace_that_cannot_be_written_does_not_end_the_run",
            "tests/megatron/test_timeline.py::test_metrics_that_fail_are_switched_off_with_one_warning",
            f"{_STORAGE}::test_a_timeline_whose_folder_goes_in_mid_run_is_switched_off",
        ),
    ),
    Row(
        "a checkpoint cannot be written during training",
        "the rank ends with Megatron's error, and the launcher ends the other ranks",
        "when the checkpoint is written",
        "-",
        "`OSError: [Errno 28] No space left on device`",
        SINCE_CHECKPOINT,
        (f"{_STORAGE}::test_a_checkpoint_that_cannot_be_written_ends_the_job",),
    ),
    Row(
        "an output file of `plan`, `view`, `trace` or `tune` cannot be written",
        "the command ends before it starts its work",
        "below 2 s",
        "-",
        "`--save /proc/x: cannot be written: No such file or directory`",
        "nothing",
        ("tests/cli/test_main.py::test_outputs_are_checked_before_the_work",),
    ),
    Row(
        "a rank dies under `torchrun --max-restarts`, over gloo",
        "torchrun restarts all ranks from the checkpoint; restarts need `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`, which "
        "`wallfacer run` sets",
        "at once",
        "-",
        "the message of torchrun",
        SINCE_CHECKPOINT,
        ("tests/presets/test_restarts.py", "tests/presets/test_launch.py::test_restarts_have_a_store_of_their_own"),
    ),
    Row(
        "the corpus in the cache of `wallfacer demo` is damaged",
        "the command writes the corpus again",
        "before the launch",
        "-",
        "-",
        "nothing",
        ("tests/training_runs/test_corpus.py::test_a_damaged_corpus_is_written_again",),
    ),
    Row(
        "ranks or checkpoint writers of an earlier Slurm job still run on a node, or a port is still in use",
        "preflight names the processes and the port, and does not end the processes",
        "before training",
        "-",
        "`preflight: node7: note: left over: process 4711, rank 5 of job 17: ...`",
        "nothing",
        ("tests/slurm/test_preflight.py::test_what_an_earlier_job_left_is_named_and_lives_on",),
    ),
    Row(
        "under Slurm, a number in a variable, preset, flag, run folder or scontrol output is malformed",
        "the batch script ends without evaluating the value as shell text, also in a dry run",
        "at start",
        "-",
        "`SAVE_INTERVAL=08: must be a whole number from 0 to 999999999`",
        NOTHING,
        (_VALUES,),
    ),
)
