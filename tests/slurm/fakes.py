"""pretrain_gpt.sbatch in a job that is made up: srun and scontrol are scripts that note how they are called."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "slurm" / "pretrain_gpt.sbatch"
TINY = REPOSITORY / "configs" / "tiny-cpu.yaml"

#: `preflight` and `training` are shell text, which finds the file for its output and the folder for checkpoints.
SRUN = """#!/bin/bash
for word; do case $word in --output=*) output=${word#*=} ;; esac; done
printf '%s ' srun "$@" >>"$FAKES/calls"
echo >>"$FAKES/calls"
case "$*" in
*preflight.sh*) source "$FAKES/preflight" >"$output" ;;
*--overlap*) ;;
*scripts.slurm.facts* | *scripts.slurm.summary*) while [[ $1 == --* ]]; do shift; done; "$@" ;;
*) source "$FAKES/training" >"$output" ;;
esac
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$FAKES/calls"
case "$1 $2" in
"show hostnames") printf 'n1\\nn2\\n' ;;
"show job") cat "$FAKES/job" ;;
esac
"""
GOOD = "for node in n1 n2; do echo preflight: $node: ok: Python 3.12, torch 2.15; done\n"


@dataclass
class Job:
    """One attempt, and what it left.

    Attributes:
        folder: of everything.
        training: shell text in the place of the training; its stdout is the log.
        preflight: the same for preflight.
        state: of the job, as scontrol shows it.
        minutes: to the time limit; None where there is no limit.
        restarts: attempts before this one.
    """

    folder: Path
    training: str = ""
    preflight: str = GOOD
    state: str = "RUNNING"
    minutes: float | None = 60
    restarts: int = 0
    variables: dict[str, str] = field(default_factory=dict)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the script as the node that has the batch shell does."""
        fakes = self.folder / "fakes"
        fakes.mkdir(exist_ok=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (fakes / name).write_text(text)
            (fakes / name).chmod(0o755)
        (fakes / "training").write_text(self.training)
        (fakes / "preflight").write_text(self.preflight)
        (fakes / "calls").write_text("")
        limit = "Unknown" if self.minutes is None else datetime.now() + timedelta(minutes=self.minutes)
        end = limit if isinstance(limit, str) else limit.strftime("%Y-%m-%dT%H:%M:%S")
        (fakes / "job").write_text(f"JobId=7 JobState={self.state} EndTime={end} Deadline=N/A\n")
        slurm = {"JOB_ID": "7", "JOB_NODELIST": "n[1-2]", "NNODES": "2", "RESTART_COUNT": str(self.restarts)}
        environment = {
            "PATH": f"{fakes}:{os.environ['PATH']}",
            "FAKES": str(fakes),
            "CHECKPOINTS": str(self.folder / "run" / "checkpoints"),
            "CONFIG": str(TINY),
            "RUN_DIR": str(self.folder / "run"),
            "PYTHON": sys.executable,
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            **{f"SLURM_{name}": value for name, value in slurm.items()},
        }
        return subprocess.run(
            ["bash", SCRIPT, *words],
            env=environment | self.variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )

    @property
    def calls(self) -> list[str]:
        """Of srun and scontrol, in order."""
        return (self.folder / "fakes" / "calls").read_text().splitlines()

    @property
    def training_call(self) -> str:
        """The command that trains."""
        (call,) = (call for call in self.calls if "--kill-on-bad-exit=1" in call)
        return call

    @property
    def requeued(self) -> bool:
        """Whether it asked for that."""
        return "scontrol requeue 7" in self.calls

    @property
    def finished(self) -> bool:
        """Whether its flag is there."""
        return (self.folder / "run" / "finished").exists()


def saves(iteration: int) -> str:
    """Shell text of a training that leaves a checkpoint."""
    return f'echo {iteration} >"$CHECKPOINTS/latest_checkpointed_iteration.txt"\n'
