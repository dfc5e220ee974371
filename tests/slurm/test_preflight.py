"""scripts/slurm/preflight.sh on this machine, which has no GPU or is told so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.fakes import REPOSITORY
from tests.support.job_store import job_store

SCRIPT = REPOSITORY / "scripts" / "slurm" / "preflight.sh"

COMMAND = ("sh", "-c", "echo \"node '$SLURM_NODEID', $0\"")


def preflight(folder: Path, *, python: str = sys.executable, gpus: int = 0, megatron: str = "", there: int = 0) -> str:
    """Its last line; with an nvidia-smi that shows as many GPUs as are ``there``."""
    (folder / "nvidia-smi").write_text(f"#!/bin/bash\nfor n in $(seq {there}); do echo GPU $n: made up; done\n")
    (folder / "nvidia-smi").chmod(0o755)
    done = subprocess.run(
        [SCRIPT, python, str(gpus), megatron, folder / "snapshot", *COMMAND],
        cwd=REPOSITORY,
        env=os.environ
        | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURMD_NODENAME": "n1", "CUDA_VISIBLE_DEVICES": ""}
        | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    line = done.stdout.splitlines()[-1]
    assert (done.returncode == 0) == line.startswith("preflight: n1: ok: ")
    return line


def test_a_good_node_says_its_versions_and_writes_down_what_is_installed(tmp_path: Path) -> None:
    line = preflight(tmp_path)
    assert f"Python {sys.version.split()[0]}, torch " in line
    snapshot = (tmp_path / "snapshot").read_text()
    assert "\ntorch==" in snapshot
    # Elsewhere than on node 0 the command does not ask Megatron's parser, which takes seconds; the launch does.
    assert snapshot.endswith("node '', --dry-run\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"python": "/no/python"}, "PYTHON=/no/python: is not here"),
        ({"python": "false"}, ""),
        ({"megatron": "/no/megatron"}, "MEGATRON_PATH=/no/megatron: has no pretrain_gpt.py here"),
        ({"gpus": 8, "there": 7}, "nvidia-smi shows 7 of 8 GPUs"),
        ({"gpus": 8, "there": 8}, "torch "),
    ],
)
def test_a_bad_node_says_why(tmp_path: Path, options: dict, message: str) -> None:
    line = preflight(tmp_path, **options)
    assert line.startswith(f"preflight: n1: error: {message}")
    if options.get("there") == 8:
        assert line.endswith(" sees 0 of 8 GPUs")


def leftovers(port: int, **variables: str) -> list[str]:
    command = [sys.executable, SCRIPT.with_name("leftovers.py"), f"n1:{port}"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


def test_what_an_earlier_job_left_is_named_and_lives_on() -> None:
    rank = {"RANK": "5", "MASTER_ADDR": "n1", "SLURM_JOB_ID": "17"}
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=os.environ | rank)
    try:
        with job_store() as used:
            port = int(used["MASTER_PORT"])
            lines = leftovers(port, SLURM_JOB_ID="18")
            assert f"left over: port {port} is in use" in lines
        named = f"left over: process {sleeper.pid}, rank 5 of job 17: "
        assert any(line.startswith(named) for line in lines)
        # A job does not report its own ranks.
        assert not any(line.startswith(named) for line in leftovers(port, SLURM_JOB_ID="17"))
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()
