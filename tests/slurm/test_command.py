"""pretrain_gpt.sbatch: what it would run, what it rejects, and that shellcheck has nothing to say."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.fakes import REPOSITORY, SCRIPT, TINY, Job

GPU = REPOSITORY / "configs" / "llama3-8b-128k.yaml"


def dry_run(*words: str, cwd: Path = REPOSITORY, **variables: str) -> subprocess.CompletedProcess[str]:
    """Where there is no cluster."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        ["bash", SCRIPT, *words],
        cwd=cwd,
        env=clean | {"DRY_RUN": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def command(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.splitlines()[-1])


def after(words: list[str], flag: str) -> str:
    """The value of a flag that stands once."""
    assert words.count(flag) == 1, flag
    return words[words.index(flag) + 1]


def test_without_a_cluster_it_prints_the_command() -> None:
    words = command(dry_run("--lr", "1e-5", CONFIG="configs/llama3-8b-128k.yaml", RUN_DIR="/runs/mine"))
    assert words[0] == "srun"
    assert {"--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", "--wait=60", "--label"} < set(words)
    assert after(words, "--save") == after(words, "--load") == "/runs/mine/checkpoints"
    assert after(words, "--ckpt-format") == "torch_dist"
    assert after(words, "--save-interval") == "100"
    assert after(words, "--lr") == "1e-5"
    assert after(words, "run") == str(GPU)
    assert "--megatron-path" not in words
    assert "--exit-duration-in-mins" not in words  # no job, no limit
    assert not [word for word in words if word.startswith("--container")]


def test_the_preset_command_takes_it(tmp_path: Path) -> None:
    """What follows `run` is rendered by wallfacer itself, down to torchrun."""
    words = command(dry_run("--nnodes", "3", CONFIG=str(TINY), RUN_DIR=str(tmp_path)))
    start = next(number for number, word in enumerate(words) if word.endswith("python") or "python3" in word)
    shown = subprocess.run([*words[start:], "--dry-run"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    torchrun = shlex.split(shown.stdout)
    assert after(torchrun, "--nnodes") == "3"
    assert after(torchrun, "--rdzv-endpoint") == "FIRST_NODE:20000"
    assert after(torchrun, "--rdzv-backend") == "c10d"
    assert "CUDA_VISIBLE_DEVICES=" in torchrun
    assert after(torchrun, "--exit-signal") == "SIGUSR2"


def test_in_a_job_nodes_port_and_time_come_from_it(tmp_path: Path) -> None:
    job = Job(tmp_path, minutes=70.5)
    assert job.run().returncode == 0
    words = shlex.split(job.training_call)
    assert after(words, "--nnodes") == "2"
    assert after(words, "--rdzv-id") == "7"
    assert after(words, "--rdzv-endpoint") == "n1:20007"
    assert after(words, "--exit-duration-in-mins") == "60"
    unlimited = Job(tmp_path / "unlimited", minutes=None)
    unlimited.folder.mkdir()
    assert unlimited.run().returncode == 0
    assert "--exit-duration-in-mins" not in unlimited.training_call


def test_a_limit_that_leaves_no_time_is_rejected(tmp_path: Path) -> None:
    job = Job(tmp_path, minutes=10.5)
    done = job.run()
    assert done.returncode == 1
    assert "s to the time limit are less than EXIT_MARGIN_S=600 and a minute" in done.stderr
    assert not job.requeued
    assert Job(tmp_path, minutes=10.5, variables={"EXIT_MARGIN_S": "60"}).run().returncode == 0


def test_without_checkpoints_nothing_is_saved(tmp_path: Path) -> None:
    words = command(dry_run(CONFIG=str(TINY), SAVE_INTERVAL="0"))
    assert not {"--save", "--load", "--exit-signal-handler"} & set(words)


def test_the_save_interval_of_the_preset_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"extends: [{TINY}]\nMODEL_ARGS:\n  --save-interval: 7\n")
    assert after(command(dry_run(CONFIG=str(tmp_path / "mine.yaml"))), "--save-interval") == "7"


def test_a_checkout_and_a_container(tmp_path: Path) -> None:
    (tmp_path / "pretrain_gpt.py").touch()
    done = dry_run(
        CONFIG=str(GPU),
        RUN_DIR="/runs/mine",
        MEGATRON_PATH=str(tmp_path),
        CONTAINER_IMAGE="nvcr.io#nvidia/pytorch:25.09-py3",
        CONTAINER_MOUNTS="/data:/data,/scratch:/scratch",
        CONTAINER_ENV="WANDB_PROJECT",
        NCCL_IB_HCA="mlx5",
    )
    words = command(done)
    assert after(words, "--megatron-path") == str(tmp_path)
    options = dict(word.split("=", 1) for word in words if word.startswith("--container"))
    assert options["--container-image"] == "nvcr.io#nvidia/pytorch:25.09-py3"
    assert options["--container-workdir"] == str(REPOSITORY)
    mounts = options["--container-mounts"].split(",")
    assert mounts[-2:] == ["/data:/data", "/scratch:/scratch"]
    assert {f"{folder}:{folder}" for folder in (REPOSITORY, tmp_path, "/runs/mine")} <= set(mounts)
    assert {"NCCL_IB_HCA", "WANDB_PROJECT", "PYTHONFAULTHANDLER"} <= set(options["--container-env"].split(","))
    assert words[words.index("-m") - 1] == "python3"  # the image's


def test_in_a_container_the_preset_is_read_there(tmp_path: Path) -> None:
    job = Job(tmp_path, variables={"CONTAINER_IMAGE": "image.sqsh"})
    assert job.run().returncode == 0
    (asked,) = (call for call in job.calls if "scripts.slurm.facts" in call)
    assert "--container-image=image.sqsh" in asked
    assert "--container-image=image.sqsh" in job.training_call


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "CONFIG is not set: CONFIG=configs/NAME.yaml sbatch ..."),
        ({"CONFIG": "none.yaml"}, f"CONFIG={REPOSITORY}/none.yaml: there is no such file"),
        ({"CONFIG": str(TINY), "MEGATRON_PATH": "/nowhere"}, "MEGATRON_PATH=/nowhere: has no pretrain_gpt.py"),
        ({"CONFIG": str(TINY), "PYTHON": "/no/python", "DRY_RUN": "1"}, "PYTHON=/no/python: has no PyYAML"),
        ({"CONFIG": str(TINY), "WALLFACER_ROOT": "/nowhere"}, "WALLFACER_ROOT=/nowhere is not the repository"),
        ({"CONFIG": str(TINY), "MAX_REQUEUES": "-1"}, "MAX_REQUEUES=-1: must be a whole number"),
        ({"CONFIG": str(TINY), "DRY_RUN": "0"}, "this is no Slurm job: submit it with sbatch, or set DRY_RUN=1"),
    ],
)
def test_a_mistake_is_one_line(variables: dict[str, str], message: str) -> None:
    done = dry_run(**variables)
    assert done.returncode == 1
    assert done.stderr.startswith(f"wallfacer: error: {message}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--save", "/here"], "command line: --save: on Slurm, set the variable CHECKPOINT_DIR instead"),
        (["7"], "7: must be a flag"),
        (["--nproc-per-node", "x"], "command line: --nproc-per-node x: must be a positive whole number"),
    ],
)
def test_a_mistake_in_the_flags_is_the_presets(words: list[str], message: str) -> None:
    done = dry_run(*words, CONFIG=str(TINY))
    assert done.returncode != 0
    assert done.stderr.startswith(f"wallfacer: error: {message}")
    assert done.stdout == ""


def test_shellcheck_is_content() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck (apt-get install shellcheck)")
    folder = SCRIPT.parent
    scripts = [path for path in folder.iterdir() if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 5
    done = subprocess.run(
        ["shellcheck", "--external-sources", *scripts], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
