"""``wallfacer run``: the tiny preset trains, and what is typed reaches Megatron."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_wallfacer.cli import run
from megatron_wallfacer.cli.main import main
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets.check import CheckResult
from megatron_wallfacer.presets.launch import Launch
from megatron_wallfacer.presets.script_flags import flags_of_script
from megatron_wallfacer.training_runs.training_log import parse_iteration

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


def printed_in(page: str) -> list[str]:
    """Return the lines of the startup report that a page shows, without those about times."""
    lines = (REPOSITORY / page).read_text().splitlines()
    return [line for line in lines if line.startswith("wallfacer: ") and not re.search(r"\d s\b", line)]


def test_the_tiny_preset_trains_on_two_ranks_and_prints_what_the_pages_show() -> None:
    done = wallfacer("run", TINY, "--train-iters", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    iterations = [found for line in done.stdout.splitlines() if (found := parse_iteration(line))]
    assert [iteration.number for iteration in iterations] == [1, 2]
    assert all(5 < iteration.loss < 7 for iteration in iterations)  # log 257 = 5.5 and what a random start adds
    assert "train_iters ..................................... 2" in done.stdout
    printed = done.stdout.splitlines()
    for page in ("README.md", "docs/tutorial.md"):
        shown = printed_in(page)
        assert "wallfacer: 2 of 2 attention layers" in shown
        assert len(shown) > 3
        assert not set(shown) - set(printed), f"{page} shows lines that are not printed"


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's parser takes everything: asking takes seconds."""
    monkeypatch.setattr(run, "check_presets", lambda *_: [CheckResult("0.19.2", (), None, True, True)])


def test_a_run_that_fails_fails_the_command(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('the script ran')")
    done = wallfacer("run", TINY, "--script", str(script), "--nproc-per-node", "1", "--wallfacer-cp-size", "1")
    assert done.returncode == 1  # torchrun's
    assert "the script ran" in done.stderr


def test_a_wrong_flag_is_one_line_before_the_launch(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Megatron would print its usage once per rank."""
    monkeypatch.setattr(Launch, "replace_this_process", lambda _: pytest.fail("launched"))
    assert main(["run", TINY, "--seq-lenght", "256"]) == 2
    message = "--seq-lenght: this Megatron has no such flag; did you mean --seq-length?"
    assert capfd.readouterr() == ("", f"wallfacer: error: command line: {message}\n")


def test_flags_of_the_script_are_good(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Those that it, or a module in its folder, adds to Megatron's parser. A dry run asks too."""
    (tmp_path / "own.py").write_text("def add(parser):\n    parser.add_argument('--of-a-module', nargs=2)\n")
    script = tmp_path / "train.py"
    script.write_text("import own\n\ndef more(parser):\n    parser.add_argument('--of-the-script')\n")
    flags = ["--of-a-module", "1", "2", "--of-the-script", "x"]
    assert main(["run", TINY, "--script", str(script), *flags, "--of-teh-script", "x", "--dry-run"]) == 2
    message = "--of-teh-script: this Megatron has no such flag; did you mean --of-the-script?"
    assert capfd.readouterr() == ("", f"wallfacer: error: command line: {message}\n")


def test_flags_whose_names_are_made_may_be_any(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("def more(parser):\n    for name in 'ab':\n        parser.add_argument(f'--{name}')\n")
    assert flags_of_script(script) is None


def test_in_a_slurm_job_the_first_node_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "check_presets", lambda *_: pytest.fail("asked"))
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert main(["run", TINY, "--dry-run"]) == 0
    assert "-m megatron_wallfacer" in capsys.readouterr().out


def test_without_megatron_flags_are_not_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise WallfacerError("there is none")

    monkeypatch.setattr(run, "check_presets", none)
    assert main(["run", TINY, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "-m megatron_wallfacer" in said.out
    assert said.err == "wallfacer: flags are not checked before the launch: there is none\n"


@pytest.mark.usefixtures("unasked")
def test_a_dry_run_prints_the_command_that_a_shell_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", TINY, "--script", os.devnull, "--dry-run"]) == 2
    assert "/dev/null: must be a file" in capsys.readouterr().err
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


@pytest.mark.usefixtures("unasked")
def test_a_dry_run_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", TINY, "--script", __file__, "--env", "A=b c", "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["environment"]["A"] == "b c"
    assert shown["command"][0] == sys.executable
    assert __file__ in shown["command"]


@pytest.mark.usefixtures("unasked")
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["none.yaml"], "none.yaml: No such file or directory"),
        ([TINY, "--megatron-path", "/nowhere"], "/nowhere/pretrain_gpt.py: must be a file"),
        ([TINY, "--json"], "--json: needs --dry-run"),
        ([TINY, "--nnodes", "2"], "command line: --nnodes 2: needs --rdzv-endpoint"),
    ):
        assert main(["run", *words]) == 2
        assert capsys.readouterr().err.startswith(f"wallfacer: error: {message}")


def test_other_commands_still_know_their_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["volume", "--lr", "1"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --lr 1" in capsys.readouterr().err
