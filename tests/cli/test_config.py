"""``wallfacer config``: shows what would be run and where it is written, and checks it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_wallfacer.cli import config
from megatron_wallfacer.cli.main import main
from megatron_wallfacer.presets.check import CheckResult, Problem
from megatron_wallfacer.presets.launch import checkout_of

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = str(CONFIGS / "tiny-cpu.yaml")


def test_show_prints_every_entry_with_its_location(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", TINY, "--lr", "1e-5", "--mock-data=false", "--env", "A=1"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert "# validated_on: CPU, 2 ranks over gloo, trained by the tests" in output
    lines = [line.split(" # ") for line in output if not line.startswith("#")]
    shown = {text.strip(): place for text, place in lines}
    assert shown["--lr 1e-5"] == shown["A=1"] == "command line"
    assert shown["--num-layers 2"] == f"{CONFIGS}/model/tiny.yaml:3"
    assert shown["--swiglu"] == f"{CONFIGS}/model/tiny.yaml:11"
    assert shown["--nproc-per-node 2"] == f"{TINY}:4"
    assert shown["CUDA_VISIBLE_DEVICES="] == f"{CONFIGS}/env/cpu.yaml:3"
    assert "--mock-data" not in shown


def test_show_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", TINY, "--json", "--nproc-per-node", "4", "--lr", "1"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"] == TINY
    assert shown["environment"] == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    assert (shown["ranks"], shown["torchrun"]) == (4, ["--nproc-per-node", "4"])
    assert shown["argv"][:2] == ["--num-layers", "2"]
    assert shown["argv"][shown["argv"].index("--lr") + 1] == "1"
    assert shown["validated_on"] == ["CPU, 2 ranks over gloo, trained by the tests"]
    assert shown["locations"]["--num-layers"] == f"{CONFIGS}/model/tiny.yaml:3"
    assert shown["locations"]["--lr"] == shown["locations"]["--nproc-per-node"] == "command line"
    assert len(shown["locations"]) == 3 + sum(word.startswith("--") for word in shown["argv"])


def test_typed_arguments_keep_their_order_and_form(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where they look like options, or stand around those of the command itself."""
    words = [
        "--a",
        "-1",
        "--data-path",
        "0.5 x",
        "y",
        "--env",
        "B=1",
        "--c=-3",
        "--json",
        "--no-value",
        "--d",
        "1",
        "2",
    ]
    assert main(["config", "show", TINY, *words]) == 0
    argv = json.loads(capsys.readouterr().out)["argv"]
    assert argv[-11:] == ["--a", "-1", "--data-path", "0.5 x", "y", "--c", "-3", "--no-value", "--d", "1", "2"]


def test_check_uses_a_real_megatron(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The installed Megatron, also if the current folder contains another megatron."""
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert main(["config", "check", TINY]) == 0
    good = capfd.readouterr().out
    assert good.startswith(f"{TINY}: valid: megatron-core 0.")
    assert good.endswith("2 ranks, team-ring: ring_outer 2\n")


def test_check_names_each_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    problems = (Problem("p.yaml:3", "--a: is bad"), Problem("command line", "--b: is worse"))
    monkeypatch.setattr(config, "check_presets", lambda *_: [CheckResult("0.19.2", problems, None, True, True)])
    assert main(["config", "check", TINY]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "wallfacer: error: p.yaml:3: --a: is bad\nwallfacer: error: command line: --b: is worse\n"
    assert main(["config", "check", TINY, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["config"], answer["valid"], answer["megatron"]) == (TINY, False, "0.19.2")
    assert answer["problems"][0] == {"place": "p.yaml:3", "text": "--a: is bad"}


@pytest.mark.parametrize(
    ("verdict", "end"),
    [
        (
            CheckResult("0.19.2", (), None, False, False),
            "the plugin's rules were not checked, because the preset has no model",
        ),
        (CheckResult("0.19.2", (), None, True, True), "the plugin is off"),
        (CheckResult("0.19.2", (), "ring: ring_outer 2", True, True), "2 ranks, ring: ring_outer 2"),
        (
            CheckResult("0.19.2", (), "ring: ring_outer 2", True, False),
            "the kernel was not checked, because this node has no GPU",
        ),
    ],
)
def test_check_reports_what_was_not_checked(
    verdict: CheckResult, end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config, "check_presets", lambda *_: [verdict])
    assert main(["config", "check", TINY]) == 0
    assert capsys.readouterr().out.endswith(f"; {end}\n")


def test_check_uses_the_megatron_that_will_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Megatron of --megatron-path, of the script's folder, or the installed one."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 3\nPATCH = 1\n")
    (tmp_path / "pretrain_gpt.py").touch()
    for words in (["--megatron-path", str(tmp_path)], ["--script", str(tmp_path / "pretrain_gpt.py")]):
        assert main(["config", "check", TINY, *words]) == 2
        assert "wallfacer: error: megatron-core 0.3.1 is not supported" in capsys.readouterr().err
    assert checkout_of(CONFIGS.parent / "scripts" / "pretrain_gpt.py", None) is None
    assert main(["config", "check", TINY, "--megatron-path", str(CONFIGS)]) == 2
    assert "must be a Megatron-LM checkout" in capsys.readouterr().err


def test_a_megatron_that_cannot_be_imported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text("raise ImportError('no such luck')")
    assert main(["config", "check", TINY, "--megatron-path", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "wallfacer: error: the process that runs Megatron's parser failed: ImportError: no such luck"


def test_show_and_a_dry_run_import_nothing_heavy() -> None:
    code = (
        "import sys; from megatron_wallfacer.cli import run; from megatron_wallfacer.cli.main import main; "
        "run._check = lambda *_: None; "  # in a process of its own
        f"main(['config', 'show', {TINY!r}]); main(['run', {TINY!r}, '--dry-run']); "
        "print([name for name in ('torch', 'numpy', 'matplotlib', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
