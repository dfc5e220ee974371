"""scripts/slurm/sweep.sh: the jobs that it submits, and the table that it makes of their logs."""

from __future__ import annotations

import csv
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.fakes import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "slurm" / "sweep.sh"
SIZES = {"CONFIG": "configs/tiny-cpu.yaml", "CP_SIZES": "2 4", "SEQ_LENGTHS": "128 256", "SCHEMES": "ring team-ring"}
LINE = (
    "3:  [2026-11-21 13:00:00.0] iteration {:8}/      20 | consumed samples: 8 | elapsed time per iteration (ms): {} | "
    "learning rate: 6.0E-04 | global batch size: 4 | lm loss: {} | loss scale: 1.0 | grad norm: 1.5 | number of ..."
)


def sweep(*words: str, cwd: Path = REPOSITORY, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *words],
        cwd=cwd,
        env=os.environ | {"PYTHON": sys.executable} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_dry_run_prints_a_job_a_cell(tmp_path: Path) -> None:
    done = sweep("--lr", "1e-5", DRY_RUN="1", SBATCH_ARGS="--nodes=2 --time=20", SWEEP_DIR="runs/mine", **SIZES)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(commands) == 8
    first = commands[0]
    assert first[:3] == ["env", "RUN_DIR=runs/mine/cp2-seq128-ring", "SAVE_INTERVAL=0"]
    assert first[first.index("sbatch") + 1 :][:4] == [
        "--job-name=wallfacer-cp2-seq128-ring",
        "--nodes=2",
        "--time=20",
        "scripts/slurm/pretrain_gpt.sbatch",
    ]
    flags = "--wallfacer-cp-size 2 --wallfacer-scheme ring --seq-length 128 --max-position-embeddings 128"
    assert " ".join(first).endswith(f"{flags} --train-iters 20 --log-interval 1 --lr 1e-5")
    assert {command[1] for command in commands} == {
        f"RUN_DIR=runs/mine/cp{size}-seq{length}-{scheme}"
        for size in (2, 4)
        for length in (128, 256)
        for scheme in ("ring", "team-ring")
    }


def test_what_is_finished_is_not_submitted_again(tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text('#!/bin/bash\necho "$RUN_DIR $SAVE_INTERVAL $CONFIG $*"\n')
    (tmp_path / "sbatch").chmod(0o755)
    finished = tmp_path / "sweep" / "cp4-seq128-ring"
    finished.mkdir(parents=True)
    (finished / "finished").touch()
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = sweep(SWEEP_DIR=str(tmp_path / "sweep"), PATH=path, **SIZES)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 7
    assert f"{tmp_path}/sweep/cp2-seq128-ring 0 configs/tiny-cpu.yaml --job-name=" in done.stdout
    assert "cp4-seq128-ring is finished already" in done.stderr


@pytest.mark.parametrize("missing", ["CONFIG", "CP_SIZES", "SEQ_LENGTHS"])
def test_a_missing_variable_is_one_line(missing: str) -> None:
    done = sweep(DRY_RUN="1", **{name: value for name, value in SIZES.items() if name != missing})
    assert (done.returncode, done.stderr) == (1, f"sweep: error: {missing} is not set\n")


def test_other_mistakes(tmp_path: Path) -> None:
    assert "there is no such file" in sweep(**(SIZES | {"CONFIG": "none.yaml"})).stderr
    assert "in the folder of the repository" in sweep(cwd=tmp_path, **SIZES).stderr
    assert "is no folder; SWEEP_DIR names it" in sweep("--collect", SWEEP_DIR=str(tmp_path / "none")).stderr


def test_collect(tmp_path: Path) -> None:
    """The last attempt counts; a job that has not trained is named and makes the command fail."""

    def log(cell: str, name: str, *iterations: tuple[int, str, str], age: int = 0) -> None:
        folder = tmp_path / cell / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(["0: wallfacer: versions", *(LINE.format(*row) for row in iterations)]))
        os.utime(folder / name, (1e9 - age, 1e9 - age))

    log("cp16-seq256-team-ring", "train-9-0.log", (1, "20.5", "5.25"), (2, "10.5", "5.125"))
    log("cp2-seq256-ring", "train-10-0.log", (1, "30.5", "5.5"))
    log("cp2-seq256-ring", "train-9-0.log", (1, "99.5", "9.5"), age=100)
    (tmp_path / "something-else").mkdir()
    done = sweep("--collect", SWEEP_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert list(csv.reader(io.StringIO(done.stdout))) == [
        ["cp_size", "seq_length", "scheme", "iteration", "milliseconds", "loss", "grad_norm"],
        ["2", "256", "ring", "1", "30.5", "5.5", "1.5"],
        ["16", "256", "team-ring", "1", "20.5", "5.25", "1.5"],
        ["16", "256", "team-ring", "2", "10.5", "5.125", "1.5"],
    ]
    log("cp8-seq256-ring", "train-11-0.log")
    done = sweep("--collect", SWEEP_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "cp8-seq256-ring has no iterations" in done.stderr
    assert len(done.stdout.splitlines()) == 4
