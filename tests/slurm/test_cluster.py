"""pretrain_gpt.sbatch on a real Slurm: four nodes on this machine, the tiny preset, a CPU rank a node.

The tests share one cluster and three jobs; the one that is interrupted twice trains on while another is cancelled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.megatron.training import LOSS_TOLERANCE
from tests.slurm.cluster import Cluster, processes_with, wait_for, why_not
from tests.slurm.jobs import ITERATIONS, RealJob


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running
    assert wait_for("an end of all processes", lambda: not processes_of(running), 30)


def processes_of(cluster: Cluster) -> list[int]:
    return processes_with(f"SLURM_CONF={cluster.folder}/slurm.conf")


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> RealJob:
    """Four nodes, not interrupted, over."""
    job = RealJob(cluster, "whole", nodes=4, minutes=30)
    job.wait_for_state("COMPLETED", "FAILED")
    return job


@pytest.fixture(scope="module")
def survivor(whole: RealJob) -> RealJob:
    """Two nodes; a rank is killed in the sixth iteration or later, and the second attempt trains."""
    # A minute of training: what the time limit leaves. Slurm counts in minutes, and looks every half one.
    job = RealJob(
        whole.cluster,
        "survivor",
        nodes=2,
        minutes=6,
        pace="0.4 2",
        options="--signal=B:USR1@30",
        EXIT_MARGIN_S="270",
        SAVE_INTERVAL="4",
    )
    job.wait_for_iteration(6, attempt=0)
    job.kill_a_rank(1)
    job.wait_for_requeue(1)
    job.wait_for_iteration(5, attempt=1)
    return job


def follows(job: RealJob, attempt: int, whole: RealJob) -> list[int]:
    """The iterations of an attempt, whose losses are those of the uninterrupted run."""
    losses = {iteration.number: iteration.loss for iteration in whole.iterations(0)}
    numbers = [iteration.number for iteration in job.iterations(attempt)]
    wanted = [losses[number] for number in numbers]
    if len(wanted) > 1 and numbers[0] > 1:
        # What Megatron logs second after a start is the mean of the first two; the whole run has it in iteration 2.
        wanted[1] = (wanted[0] + wanted[1]) / 2
    assert [iteration.loss for iteration in job.iterations(attempt)][: len(wanted)] == pytest.approx(
        wanted, rel=LOSS_TOLERANCE
    )
    return numbers


def assert_exits_after_a_minute(log: str) -> None:
    """Of all ranks together: each looks at its clock, the first to have reached it ends all, rank 0 says its own."""
    assert "startup-program-entry-spread" in log, "ranks have not agreed on a start"
    (minutes,) = re.findall(r"\[exiting program after (\S+) minutes\]", log)
    assert 0.995 < float(minutes) < 2


def test_it_trains_across_four_nodes(whole: RealJob) -> None:
    assert whole.cluster.state(whole.id) == "COMPLETED", whole.said() + "\n".join(whole.log(0)[-50:])
    text = "\n".join(whole.log(0))
    assert [iteration.number for iteration in whole.iterations(0)] == list(range(1, ITERATIONS + 1))
    assert whole.iterations(0)[-1].loss < whole.iterations(0)[0].loss - 0.01
    assert re.search(r"^\d: wallfacer: grid +The grid of 4 context-parallel ranks is ", text, flags=re.MULTILINE)
    assert ": wallfacer: 2 of 2 attention layers" in text
    assert "using world size: 4, data-parallel size: 1" in text
    assert (whole.run_dir / "finished").exists()
    assert f"wallfacer: finished at iteration {ITERATIONS}" in whole.said()


def test_its_environment_is_written_down(whole: RealJob) -> None:
    logs = whole.run_dir / "logs"
    snapshot = (logs / f"environment-{whole.id}-0.txt").read_text()
    assert "nodes: 127.0.0.[1-4]\n" in snapshot
    assert re.search(r"^torch==", snapshot, flags=re.MULTILINE)
    assert f"-m torch.distributed.run --nproc-per-node 1 --nnodes 4 --rdzv-id {whole.id}" in snapshot
    assert "--rdzv-endpoint 127.0.0.1:2" in snapshot
    preflight = (logs / f"preflight-{whole.id}-0.log").read_text()
    assert {f"preflight: 127.0.0.{number}: ok" in preflight for number in range(1, 5)} == {True}


def test_a_killed_rank_is_followed_by_a_requeue_and_the_same_losses(survivor: RealJob, whole: RealJob) -> None:
    first, second = follows(survivor, 0, whole), follows(survivor, 1, whole)
    assert first == list(range(1, first[-1] + 1))
    assert first[-1] >= 6
    # Every fourth iteration is saved; the rank may have died while that was done, and its last line with it.
    assert (second[0] - 1) % 4 == 0
    assert first[-1] - 5 <= second[0] - 1 <= first[-1] + 1
    assert "wallfacer: training failed with exit code " in survivor.said()
    assert f"wallfacer: requeued, to go on from iteration {second[0] - 1}" in survivor.said()


def test_usr1_saves_and_requeues_and_a_cancelled_job_leaves_no_process(survivor: RealJob, whole: RealJob) -> None:
    """On the two nodes that the other job leaves."""
    job = RealJob(whole.cluster, "cancelled", nodes=2, minutes=30, pace="0.7 0.7")
    job.wait_for_iteration(2, attempt=0)
    job.cluster.slurm("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for_requeue(1)
    saved = follows(job, 0, whole)[-1]
    assert f"wallfacer: requeued, to go on from iteration {saved}" in job.said()
    assert "exiting program after receiving SIGTERM" in "\n".join(job.log(0))  # as Megatron calls it
    job.wait_for_iteration(saved + 1, attempt=1)
    assert follows(job, 1, whole)[0] == saved + 1
    assert len(job.processes()) > 4
    job.cluster.slurm("scancel", job.id)
    job.wait_for_state("CANCELLED")
    wait_for("an end of its processes", lambda: not job.processes(), 60)
    assert job.cluster.field(job.id, "Restarts") == "1"
    assert not (job.run_dir / "finished").exists()


def test_the_time_limit_saves_and_the_job_goes_on_to_the_end(survivor: RealJob, whole: RealJob) -> None:
    survivor.wait_for_requeue(2)
    survivor.wait_for_state("COMPLETED", "FAILED")
    second, third = follows(survivor, 1, whole), follows(survivor, 2, whole)
    assert_exits_after_a_minute("\n".join(survivor.log(1)))
    assert second == list(range(second[0], second[-1] + 1))
    assert third == list(range(second[-1] + 1, ITERATIONS + 1))
    assert survivor.cluster.state(survivor.id) == "COMPLETED"
    assert (survivor.run_dir / "finished").exists()
    assert Path(survivor.run_dir, "checkpoints", "latest_checkpointed_iteration.txt").read_text() == str(ITERATIONS)
