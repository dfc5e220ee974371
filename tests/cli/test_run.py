"""``wallfacer run``: the tiny preset trains, and what is typed reaches Megatron."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_wallfacer.cli.main import main
from megatron_wallfacer.cli.training_log import parse_iteration

REPOSITORY = Path(__file__).parents[2]
TINY = str(REPOSITORY / "configs" / "tiny-cpu.yaml")


def wallfacer(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import sys; from megatron_wallfacer.cli.main import main; sys.exit(main())", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_tiny_preset_trains_on_two_ranks() -> None:
    done = wallfacer("run", TINY, "--train-iters", "2", "--seq-length", "128")
    assert done.returncode == 0, done.stdout + done.stderr
    iterations = [found for line in done.stdout.splitlines() if (found := parse_iteration(line))]
    assert [iteration.number for iteration in iterations] == [1, 2]
    assert all(5 < iteration.loss < 7 for iteration in iterations)  # log 257 = 5.5 and what a random start adds
    assert "wallfacer: 2 of 2 attention layers" in done.stdout
    assert "seq_length ...................................... 128" in done.stdout


def test_a_run_that_fails_fails_the_command() -> None:
    done = wallfacer("run", TINY, "--wallfacer-cp-size", "3", "--nproc-per-node", "1")
    assert done.returncode == 1  # torchrun's
    assert "wallfacer: error: --wallfacer-cp-size 3: times tensor and pipeline parallel size (1)" in done.stderr


def test_a_dry_run_prints_the_command_that_a_shell_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", TINY, "--script", os.devnull, "--dry-run"]) == 2
    assert "/dev/null is not a file" in capsys.readouterr().err
    assert main(["run", TINY, "--script", __file__, "--nproc-per-node", "4", "--env", "A=b c", "--dry-run"]) == 0
    command = capsys.readouterr().out
    # `env` and python are real, torchrun and the script are not run.
    shown = subprocess.run(
        [
            "bash",
            "-c",
            command.replace(" -m torch.distributed.run ", " -c 'import os, sys; print(os.environ, sys.argv)' "),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "'A': 'b c'" in shown
    assert "'CUDA_VISIBLE_DEVICES': ''" in shown
    assert (
        f"'--standalone', '--nproc-per-node', '4', '-m', 'megatron_wallfacer', '{__file__}', '--num-layers', '2'"
        in shown
    )


def test_a_dry_run_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", TINY, "--script", __file__, "--env", "A=b c", "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["environment"]["A"] == "b c"
    assert shown["command"][0] == sys.executable
    assert __file__ in shown["command"]


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["none.yaml"], "none.yaml: No such file or directory"),
        ([TINY, "--megatron-path", "/nowhere"], "/nowhere/pretrain_gpt.py is not a file"),
        ([TINY, "--json"], "--json: must be with --dry-run"),
        ([TINY, "--nnodes", "2"], "command line: --nnodes 2: needs --rdzv-endpoint"),
    ):
        assert main(["run", *words]) == 2
        assert capsys.readouterr().err.startswith(f"wallfacer: error: {message}")


def test_other_commands_still_know_their_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["words", "--lr", "1"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --lr 1" in capsys.readouterr().err
