"""A preset with ``--max-restarts`` over gloo: a rank is killed, torchrun starts all ranks again, and they train on."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from megatron_wallfacer.presets.launch import Launch
from megatron_wallfacer.presets.preset import load_preset
from megatron_wallfacer.shipped import CONFIGS
from megatron_wallfacer.training_runs.training_log import parse_iteration
from tests.support.namespace import in_namespace, why_no_namespace

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "killed_once.py"
LIMIT_S = 300


def launch_of(folder: Path) -> Launch:
    """The tiny preset, which saves after every second step and may restart once."""
    flags = {"--save": folder, "--load": folder, "--save-interval": 2, "--train-iters": 4, "--ckpt-format": "torch"}
    typed = [str(word) for flag in flags.items() for word in flag]
    return Launch.of(load_preset(CONFIGS / "tiny-cpu.yaml", ["--max-restarts", "1", *typed]), SCRIPT)


def test_a_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    launch = launch_of(tmp_path / "checkpoints")
    # torchrun probes the port of each attempt's store, and closes it: with a namespace it is held.
    command = launch.command if why_no_namespace() else in_namespace(*launch.command)
    environment = os.environ | launch.environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-5000:]
    # Rank 1 is killed within step 3; the second attempt begins behind the checkpoint of step 2.
    iterations = [found.number for line in output.splitlines() if (found := parse_iteration(line))]
    assert iterations == [1, 2, 3, 4]
    assert re.search(r"successfully loaded checkpoint from .* at iteration 2", output), output[-5000:]
    assert output.count("wallfacer: 2 of 2 attention layers") == 2
