"""Storage that fails at the start and in mid-run of a training."""

from __future__ import annotations

from pathlib import Path

from tests.megatron.training import arguments
from tests.support.megatron_runs import REPOSITORY, train

SCRIPT = REPOSITORY / "tests" / "support" / "failing_storage.py"
CP = ("--wallfacer-cp-size", "2")


def test_a_folder_that_cannot_be_written_ends_every_rank_at_the_start() -> None:
    run = train(2, arguments(*CP, "--wallfacer-timeline", "/proc/wallfacer", iterations=2))
    message = "--wallfacer-timeline /proc/wallfacer: cannot be written: No such file or directory"
    for rank in run.ranks:
        assert (rank.end, rank.exit_code) == ("ended", 2)
        assert f"wallfacer: error: rank {rank.rank}: {message}" in rank.output, rank.output[-3000:]
    assert run.losses == []


def test_a_timeline_whose_folder_goes_in_mid_run_is_switched_off(tmp_path: Path) -> None:
    flags = arguments(*CP, "--wallfacer-timeline", str(tmp_path / "lines"), iterations=4)
    run = train(2, flags, script=SCRIPT, env={"FAILS": "timeline"}).check()
    assert len(run.losses) == 4
    for rank in run.ranks:
        assert rank.output.count("wallfacer: warning: --wallfacer-timeline ") == 1
        assert "is switched off: " in rank.output


def test_a_checkpoint_that_cannot_be_written_ends_the_job(tmp_path: Path) -> None:
    """Steps since the last checkpoint are lost: Megatron goes on without none."""
    flags = arguments(*CP, "--save", str(tmp_path), "--save-interval", "2", "--ckpt-format", "torch", iterations=4)
    run = train(2, flags, script=SCRIPT, env={"FAILS": "checkpoint"}, grace_s=2)
    assert run.ranks[0].exit_code != 0
    assert "OSError: [Errno 28] No space left on device" in run.ranks[0].output, run.ranks[0].output[-3000:]
    assert len(run.losses) == 2
