"""``wallfacer doctor``: what it finds here, on a Megatron that does not fit, and on machines that are not this one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_wallfacer.cli.doctor import print_findings
from megatron_wallfacer.cli.main import main
from megatron_wallfacer.doctor import plugin, process
from megatron_wallfacer.doctor.checks import CHECKS
from megatron_wallfacer.doctor.finding import Finding, run_check
from megatron_wallfacer.doctor.process import run_checks
from megatron_wallfacer.kernels import KERNELS
from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.hooks import Hooks
from megatron_wallfacer.megatron.plugin_state import PluginState

REPOSITORY = Path(__file__).parents[2]
HOOKS = Hooks(PluginState((0, 19, 2), torch.device("cpu"))).every


def clean() -> dict[str, str]:
    """Return the environment without the variables that the doctor reads."""
    read = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "OMP_", "MASTER_", "WALLFACER_", "NVTE_", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not name.startswith(read)}


def doctor(*words: str) -> subprocess.CompletedProcess[str]:
    call = "import sys; from megatron_wallfacer.cli.main import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", call, "doctor", *words],
        cwd=REPOSITORY,
        env=clean() | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def here() -> subprocess.CompletedProcess[str]:
    """Return the output in a pipe, on the CPU with the installed Megatron."""
    return doctor()


def lines(text: str) -> dict[str, str]:
    """By name, the line."""
    return {re.split(r" {2,}", line)[1]: line for line in text.splitlines()[1:-1]}


def test_no_problem_here(here: subprocess.CompletedProcess[str]) -> None:
    assert here.returncode == 0, here.stdout + here.stderr
    found = lines(here.stdout)
    assert found["megatron"].startswith("ok ")
    assert found["cuda"].startswith("note ")
    assert "ranks are CPU processes over gloo" in found["cuda"]
    hooks = [name for name in found if name.startswith("hook ")]
    assert hooks == [f"hook {hook.name}" for hook in HOOKS]
    assert "add_megatron_arguments with parser" in found["hook arguments"]
    assert {name.removeprefix("kernel ") for name in found if name.startswith("kernel ")} == set(KERNELS) - {"flash"}
    assert "torch, for bf16, head dim 128" in found["kernel auto"]
    for name in ("torch", "reference"):
        assert found[f"kernel {name}"].startswith("ok ")
        assert "called forward and backward: relative errors out " in found[f"kernel {name}"]
    assert "team-ring: kv_team 2 x ring_outer 4" in found["scheme auto, cp size 8"]
    assert re.fullmatch(r"no problems, \d+ notes", here.stdout.splitlines()[-1])


def test_in_a_pipe_it_is_plain(here: subprocess.CompletedProcess[str]) -> None:
    assert here.stdout.isascii()
    assert "\x1b" not in here.stdout
    assert all(line == line.rstrip() for line in here.stdout.splitlines())
    assert all(re.match(r"(ok|note|problem) ", line) for line in here.stdout.splitlines()[1:-1])


@pytest.fixture(scope="module")
def unfit(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A checkout with one hook's target gone and another's signature changed; the rest of Megatron is the installed."""
    folder = tmp_path_factory.mktemp("checkout")
    training = folder / "megatron" / "training"
    training.mkdir(parents=True)
    (training / "__init__.py").touch()
    (training / "arguments.py").write_text("def add_megatron_arguments(renamed):\n    return renamed\n")
    (training / "training.py").write_text("print('chatter on stdout')\n")
    return doctor("--megatron-path", str(folder), "--json")


def test_hooks_that_do_not_fit_are_problems(unfit: subprocess.CompletedProcess[str]) -> None:
    assert unfit.returncode == 1
    findings = [Finding(**entry) for entry in json.loads(unfit.stdout)]
    problems = {finding.name: finding for finding in findings if finding.status == "problem"}
    in_training = {f"hook {hook.name}" for hook in HOOKS if hook.target.startswith("megatron.training.")}
    assert set(problems) == in_training >= {"hook arguments", "hook layer count"}
    assert "add_megatron_arguments has no parameter parser" in problems["hook arguments"].result
    assert "setup_model_and_optimizer does not exist" in problems["hook layer count"].result
    assert all("docs/compatibility.md" in problem.remedy for problem in problems.values())
    assert len(findings) > len(CHECKS)  # it went on


def test_a_path_that_is_no_checkout_is_wrong_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--megatron-path", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        said == f"wallfacer: error: --megatron-path {tmp_path}: must be a Megatron-LM checkout with a folder megatron\n"
    )


def test_a_missing_megatron_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    (found,) = run_check("megatron", plugin.megatron, "install it")
    assert (found.name, found.status, found.remedy) == ("megatron", "problem", "install it")
    assert found.result.startswith("megatron.core is neither beside the script nor installed")


def test_a_megatron_that_is_not_supported_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_wallfacer.megatron.version.megatron_version", lambda: (0, 16, 1))
    found = {finding.name: finding for finding in plugin.megatron()}
    assert found["megatron"].status == "problem"
    assert "megatron-core 0.16.1 is not supported" in found["megatron"].result
    # Written for 0.19 and later, and needed for packed sequences only.
    assert found["hook rope of packed sequences"].status == "note"


def test_a_hook_is_looked_at_and_not_installed() -> None:
    hook = Hook(print, "a hook", "is tested", "argparse:ArgumentParser.parse_args", (0, 17), ("self", "args"))
    import argparse

    before = argparse.ArgumentParser.parse_args
    assert [finding.status for finding in plugin._hook(hook, (0, 19, 0))] == ["ok"]
    assert argparse.ArgumentParser.parse_args is before


def test_a_check_that_raises_is_one_line() -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("first", "ok", "fine")
        raise RuntimeError("undefined symbol:\n  _ZN3c10")

    assert list(run_check("second", broken, "install it again")) == [
        Finding("first", "ok", "fine"),
        Finding("second", "problem", "RuntimeError: undefined symbol: _ZN3c10", "install it again"),
    ]

    def leaves() -> Iterator[Finding]:
        sys.exit()
        yield

    assert [finding.result for finding in run_check("x", leaves, "")] == ["SystemExit"]


def test_a_process_that_dies_is_a_problem_after_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    first = '{"name": "python", "status": "ok", "result": "3.12", "remedy": ""}\n'
    outcomes = {
        "ended with SIGSEGV: Segmentation fault": (-11, "loading\nSegmentation fault\n"),
        "ended with exit code 3: no error text": (3, ""),
    }
    for text, (code, stderr) in outcomes.items():
        done = subprocess.CompletedProcess([], code, first + '{"name": "tor', stderr)
        monkeypatch.setattr(process.subprocess, "run", lambda *_, done=done, **__: done)
        python, died = run_checks({})
        assert python.name == "python"
        assert (died.status, died.result) == ("problem", f"the process of the checks {text}; after the check 'python'")

    def sleeps(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("doctor", 1, first.encode())

    monkeypatch.setattr(process.subprocess, "run", sleeps)
    assert [finding.status for finding in run_checks({})] == ["ok", "problem"]


def test_at_a_terminal_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    name = "a.module.with.a.long.name:" + "x" * 80
    print_findings([Finding("hook", "problem", name, "[do] this")])
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert name in re.sub(r"\s", "", shown)
    assert "-> [do] this" in shown
    assert "1 problem, no notes" in shown
