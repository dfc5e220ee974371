"""What reaches the Slurm scripts from outside is checked where it enters, in dry runs too; nothing is evaluated."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.slurm.fakes import REPOSITORY, TINY, Job, saves
from tests.slurm.test_command import dry_run

VALUES = REPOSITORY / "scripts" / "slurm" / "values.sh"
#: Bash arithmetic would run `touch`, in the folder of the test.
EXECUTES = "PATH[$(touch executed)0]"
NOT_NUMBERS = (
    EXECUTES,
    "08",
    "-1",
    "+1",
    "1e3",
    "0x10",
    "1_000",
    " 7",
    "7 ",
    "7\n8",
    "٣",
    "1.0",
    "1234567890",
    "a",
    "$x",
)
NUMBERS = ("SAVE_INTERVAL", "GPUS_PER_NODE", "EXIT_MARGIN_S", "SAVE_WAIT_S", "MAX_REQUEUES")
#: Values of variables that are no numbers, and what the line says.
HOSTILE = {
    "DRY_RUN": ("yes", "0 or 1"),
    "RDZV_ENDPOINT": ("host:1;touch executed", "HOST:PORT"),
    "RDZV_ENDPOINT ": ("host:65536", "a port from 1 to 65535"),
    "RDZV_ENDPOINT  ": ("host", "HOST:PORT"),
    "CONTAINER_ENV": ("A,b-c", "names of variables"),
    "CONTAINER_IMAGE": ("image\nother", "without control characters"),
    "SRUN_ARGS": ("--mpi=none\n--uid=0", "without control characters"),
    "RUN_DIR": ("/runs/a\nb", "without control characters"),
    "SLURM_JOB_ID": (EXECUTES, "a whole number"),
    "SLURM_NNODES": (EXECUTES, "a whole number"),
    "SLURM_RESTART_COUNT": (EXECUTES, "a whole number"),
    "SLURM_JOB_NODELIST": ("n1;touch executed", "a list of host names"),
}


def bash(text: str, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", text, "bash", *words], cwd=cwd, capture_output=True, text=True, timeout=60)


def test_numbers_are_checked_and_not_evaluated(tmp_path: Path) -> None:
    """All values in one shell."""
    text = f'die() {{ echo "$*"; exit 1; }}; source {VALUES}; for v; do (check_number N "$v") && echo passed; done'
    found = bash(text, tmp_path, *NOT_NUMBERS).stdout.splitlines()
    assert len(found) == len(NOT_NUMBERS)
    assert all(": must be a whole number from 0 to 999999999" in line for line in found), found
    assert found[0].startswith("N=PATH\\[\\$\\(touch\\ executed\\)0\\]: must")
    assert bash(text, tmp_path, "0", "8", "999999999").stdout == "passed\n" * 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_checked_where_it_enters(name: str, tmp_path: Path) -> None:
    done = dry_run(CONFIG=str(TINY), cwd=tmp_path, WALLFACER_ROOT=str(REPOSITORY), **{name: EXECUTES})
    assert done.returncode == 1
    assert done.stderr.startswith(f"wallfacer: error: {name}=PATH\\[")
    assert not (tmp_path / "executed").exists()
    assert done.stdout == ""


@pytest.mark.parametrize("key", HOSTILE)
def test_a_value_is_checked_where_it_enters(key: str, tmp_path: Path) -> None:
    (value, message), name = HOSTILE[key], key.strip()
    done = dry_run(**{"CONFIG": str(TINY), "WALLFACER_ROOT": str(REPOSITORY), name: value}, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"wallfacer: error: {name}=")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["preset", "flag"])
@pytest.mark.parametrize("value", [EXECUTES, "08"])
def test_the_save_interval_of_a_preset_or_a_flag(where: str, value: str, tmp_path: Path) -> None:
    """An 08 was taken for octal: training ran without --save."""
    preset = tmp_path / "mine.yaml"
    preset.write_text(f"extends: [{TINY}]\nMODEL_ARGS:\n  --save-interval: '{value}'\n")
    words, config = ([], preset) if where == "preset" else (["--save-interval", value], TINY)
    done = dry_run(*words, CONFIG=str(config), WALLFACER_ROOT=str(REPOSITORY), cwd=tmp_path)
    assert done.returncode != 0
    assert "save_interval=" in done.stderr
    assert ": must be a whole number" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text", [EXECUTES, "08", "", "5\n6"])
def test_the_iteration_of_the_run_folder(text: str, tmp_path: Path) -> None:
    job = Job(tmp_path, training="touch trained")
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(text)
    done = job.run()
    assert done.returncode == 1
    assert "latest_checkpointed_iteration.txt=" in done.stderr
    assert not [path for path in (tmp_path / "trained", tmp_path / "executed") if path.exists()]


def test_weights_without_an_iteration_are_iteration_0(tmp_path: Path) -> None:
    job = Job(tmp_path, training=saves(3) + "exit 1")
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("release")
    assert "from iteration 0" in job.run().stdout
    assert job.requeued


@pytest.mark.parametrize(("fake", "message"), [("EndTime=$(touch executed)", "EndTime of scontrol"), (None, "node of")])
def test_the_output_of_scontrol(fake: str | None, message: str, tmp_path: Path, monkeypatch: object) -> None:
    from tests.slurm import fakes

    text = fakes.SCONTROL.replace('cat "$FAKES/job"', f"echo 'JobState=RUNNING {fake}'") if fake else None
    monkeypatch.setattr(fakes, "SCONTROL", text or fakes.SCONTROL.replace("n1\\nn2\\n", "n1;touch executed\\n"))
    done = Job(tmp_path).run()
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "executed").exists()


def test_unknown_variables_of_the_prefix_are_named() -> None:
    done = dry_run(CONFIG=str(TINY), WALLFACER_RUNDIR="/x", WALLFACER_ALLOW_UNTESTED="1")
    assert done.returncode == 0
    assert done.stderr == "wallfacer: warning: WALLFACER_RUNDIR is set, but nothing reads a variable of this name\n"


@pytest.mark.parametrize("name", ["CP_SIZES", "SEQ_LENGTHS", "SCHEMES", "ITERATIONS", "DRY_RUN"])
def test_a_sweep_checks_its_values(name: str) -> None:
    variables = {"CONFIG": str(TINY), "CP_SIZES": "2", "SEQ_LENGTHS": "64", "DRY_RUN": "1", name: "2$(touch$IFS/x)"}
    script = REPOSITORY / "scripts" / "slurm" / "sweep.sh"
    done = subprocess.run([script], cwd=REPOSITORY, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"sweep: error: {name}=")
    assert done.stdout == ""


def test_preflight_checks_the_number_of_gpus(tmp_path: Path) -> None:
    script = REPOSITORY / "scripts" / "slurm" / "preflight.sh"
    done = bash('exec "$@"', tmp_path, str(script), "python3", EXECUTES, "", "snapshot", "true")
    assert done.returncode == 1
    assert ": error: GPUS_PER_NODE=PATH" in done.stdout
    assert not list(tmp_path.iterdir())
