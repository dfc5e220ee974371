"""What becomes of a job after an attempt, and what preflight says: with srun and scontrol that are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.fakes import GOOD, Job, saves

LIMIT = "echo '0: exiting program after 50.0 minutes'\n"


def test_a_training_that_ends_is_finished_and_not_run_again(tmp_path: Path) -> None:
    job = Job(tmp_path, saves(10))
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert job.finished
    assert not job.requeued
    assert "wallfacer: finished at iteration 10" in done.stdout
    again = Job(tmp_path, "exit 1")
    assert again.run().returncode == 0
    assert not [call for call in again.calls if call.startswith("srun")]


def test_the_time_limit_is_followed_by_a_requeue(tmp_path: Path) -> None:
    job = Job(tmp_path, saves(10) + LIMIT)
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert job.requeued
    assert not job.finished
    assert "requeued, to go on from iteration 10" in done.stdout


def test_a_failure_is_shown_and_followed_by_a_requeue(tmp_path: Path) -> None:
    job = Job(tmp_path, saves(10) + "echo '1: torch.OutOfMemoryError: no more'\nexit 3")
    done = job.run()
    assert job.requeued
    assert not job.finished
    assert "training failed with exit code 3" in done.stdout
    assert "1:1: torch.OutOfMemoryError: no more" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restarts": 10}, "MAX_REQUEUES=10 is reached; to go on, submit again with RUN_DIR="),
        ({"restarts": 1, "variables": {"MAX_REQUEUES": "1"}}, "MAX_REQUEUES=1 is reached"),
        ({"state": "CANCELLED"}, "the job is CANCELLED"),
        ({"variables": {"SAVE_INTERVAL": "0"}}, "SAVE_INTERVAL=0 leaves nothing"),
    ],
)
def test_no_requeue(tmp_path: Path, options: dict, message: str) -> None:
    job = Job(tmp_path, saves(10) + "exit 3", **options)
    done = job.run()
    assert done.returncode == 1
    assert not job.requeued
    assert f"wallfacer: error: no requeue: {message}" in done.stderr


def test_a_second_attempt_without_a_new_checkpoint_is_the_last(tmp_path: Path) -> None:
    """Also where one with a checkpoint came before; a checkpoint between two starts the count again."""
    for restarts, (training, requeued) in enumerate(
        [(saves(5), True), ("", True), (saves(10), True), ("", True), ("", False)]
    ):
        job = Job(tmp_path, training + "exit 3", restarts=restarts)
        done = job.run()
        assert job.requeued == requeued, restarts
    assert done.returncode == 1
    assert "no requeue: two attempts have left no checkpoint after iteration 10" in done.stderr


def test_exit_interval_is_a_wish_not_a_limit(tmp_path: Path) -> None:
    job = Job(tmp_path, saves(5) + "echo '0: exiting program at iteration 5'")
    done = job.run("--exit-interval", "5")
    assert (done.returncode, job.requeued, job.finished) == (0, False, False)
    assert "stopped at iteration 5, as --exit-interval says" in done.stdout


def test_usr1_makes_the_ranks_save_and_the_job_go_on(tmp_path: Path) -> None:
    job = Job(tmp_path, "kill -USR1 $PPID; sleep 2\n" + saves(7) + "echo exiting program after receiving SIGTERM.")
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert job.requeued
    (asked,) = (call for call in job.calls if "--overlap" in call)
    assert "--ntasks=2" in asked
    assert asked.rstrip().endswith("ask 7") or "ask 7" in (tmp_path / "fakes" / "calls").read_text()


def test_ranks_that_do_not_end_after_usr1_are_stopped(tmp_path: Path) -> None:
    job = Job(tmp_path, saves(7) + "kill -USR1 $PPID; exec sleep 60", variables={"SAVE_WAIT_S": "2"})
    done = job.run()
    assert job.requeued
    assert "ranks have not ended 2 s after USR1" in done.stdout


def test_usr1_before_the_training_starts_none(tmp_path: Path) -> None:
    job = Job(tmp_path, "exit 1", preflight="kill -USR1 $PPID\n" + GOOD)
    job.run()
    assert job.requeued
    assert not [call for call in job.calls if "--kill-on-bad-exit" in call]


def test_a_cancelled_job_is_not_requeued(tmp_path: Path) -> None:
    job = Job(tmp_path, saves(7) + "kill -TERM $PPID; exit 143")
    done = job.run()
    assert done.returncode == 143
    assert not job.requeued
    assert "ended by Slurm (scancel, or the time limit) at iteration 7" in done.stdout


def test_preflight_names_the_nodes_that_are_not_good(tmp_path: Path) -> None:
    said = "echo 'preflight: n2: error: nvidia-smi shows 7 of 8 GPUs'; exit 1"
    job = Job(tmp_path, preflight=f"echo preflight: n1: ok: Python 3.12\n{said}")
    done = job.run()
    assert done.returncode == 1
    assert "preflight: n2: error: nvidia-smi shows 7 of 8 GPUs" in done.stderr
    assert "preflight failed on 1 of 2 nodes; without them: sbatch --exclude=n2 ..." in done.stderr
    assert not job.requeued
    silent = Job(tmp_path, preflight="exit 1").run()
    assert "preflight: n1: error: said nothing, see " in silent.stderr
    assert "sbatch --exclude=n1,n2 ..." in silent.stderr


def test_nodes_with_different_versions_do_not_train(tmp_path: Path) -> None:
    job = Job(tmp_path, preflight="echo preflight: n1: ok: torch 2.14; echo preflight: n2: ok: torch 2.15")
    done = job.run()
    assert done.returncode == 1
    assert "preflight: n1: ok: torch 2.14" in done.stderr
    assert "the nodes have different versions" in done.stderr


def test_what_was_run_is_written_down_without_secrets(tmp_path: Path) -> None:
    job = Job(tmp_path, variables={"NCCL_DEBUG": "INFO", "SLURM_JWT": "hidden", "NCCL_SECRET": "hidden"})
    job.run("--lr", "1e-5")
    text = (tmp_path / "run" / "logs" / "environment-7-0.txt").read_text()
    assert "--lr 1e-5" in text
    assert "nodes: n[1-2]" in text
    assert "NCCL_DEBUG=INFO" in text
    assert "hidden" not in text
