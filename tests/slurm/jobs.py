"""Jobs of the tiny preset on the cluster of the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from megatron_wallfacer.training_runs.training_log import Iteration, parse_iteration
from tests.slurm.cluster import Cluster, lines, processes_with, wait_for
from tests.slurm.fakes import REPOSITORY

ITERATIONS = 44
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class RealJob:
    """One rank a node.

    Args:
        cluster: where.
        name: of its folder.
        nodes: context-parallel ranks as well.
        minutes: time limit.
        pace: seconds that an iteration waits, a word an attempt; none by default.
        options: more words for sbatch.
        variables: of the script.
    """

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        *,
        nodes: int,
        minutes: int,
        pace: str = "",
        options: str = "",
        **variables: str,
    ) -> None:
        self.cluster, self.run_dir = cluster, cluster.folder / name
        self.output = cluster.folder / f"{name}.out"
        flags = f"--nproc-per-node 1 --wallfacer-cp-size {nodes} --train-iters {ITERATIONS}"
        options = f"--nodes={nodes} --time={minutes} --gpus-per-node=0 --output={self.output} {options}"
        done = subprocess.run(
            [
                *cluster.inside,
                "sbatch",
                "--parsable",
                *options.split(),
                "scripts/slurm/pretrain_gpt.sbatch",
                *flags.split(),
            ],
            cwd=REPOSITORY,
            env=cluster.environment
            | {"CONFIG": "configs/tiny-cpu.yaml", "PYTHON": sys.executable, "RUN_DIR": str(self.run_dir)}
            | {"MEGATRON_PATH": str(Path(__file__).parent), "PACE": pace}
            | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()

    def log(self, attempt: int) -> list[str]:
        """Lines of an attempt's log, none before it has begun."""
        return list(lines(self.run_dir / "logs" / f"train-{self.id}-{attempt}.log"))

    def iterations(self, attempt: int) -> list[Iteration]:
        """What an attempt has logged up to now."""
        return [found for line in self.log(attempt) if (found := parse_iteration(line))]

    def said(self) -> str:
        """What the batch shell has said."""
        return "\n".join(lines(self.output))

    def wait_for_iteration(self, number: int, attempt: int) -> None:
        """Until an attempt has logged it."""
        self._wait(f"iteration {number} of attempt {attempt}", lambda: self._has(number, attempt))

    def wait_for_state(self, *states: str) -> str:
        """Until the job is in one of them."""
        return self._wait(f"{states}", lambda: (state := self.cluster.state(self.id)) in states and state)

    def wait_for_requeue(self, restarts: int) -> None:
        """Until it has been requeued as often."""
        self._wait(f"requeue {restarts}", lambda: int(self.cluster.field(self.id, "Restarts")) >= restarts)

    def processes(self) -> list[int]:
        """Whatever runs on behalf of the job."""
        return processes_with(f"RUN_DIR={self.run_dir}")

    def kill_a_rank(self, rank: int) -> None:
        """As if it had crashed, with what it has forked: a real cluster has cgroups that see to orphans."""
        for pid in set(self.processes()) & set(processes_with(f"RANK={rank}")):
            os.kill(pid, signal.SIGKILL)

    def _has(self, number: int, attempt: int) -> bool:
        state = self.cluster.state(self.id)
        found = any(iteration.number >= number for iteration in self.iterations(attempt))
        assert found or state not in OVER, state
        return found

    def _wait(self, what: str, found: object) -> object:
        """With what the job has said where it does not come about."""
        try:
            return wait_for(f"job {self.id}: {what}", found, 400)
        except AssertionError as error:
            tails = [line for attempt in range(4) for line in self.log(attempt)[-30:]]
            raise AssertionError("\n".join([str(error), self.said(), *tails])) from None
