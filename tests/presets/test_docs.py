"""docs/presets.md is true: its commands work as they are typed, its tables and its example say what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_wallfacer.cli import config, run
from megatron_wallfacer.cli.main import main
from megatron_wallfacer.presets.check import CheckResult
from megatron_wallfacer.presets.launch import Launch
from megatron_wallfacer.presets.preset import load_preset

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "docs" / "presets.md").read_text()
COMMANDS = re.findall(r"^    (wallfacer .*?|scripts/.*?)(?:\s+#.*)?$", TEXT, flags=re.MULTILINE)


def test_there_are_commands() -> None:
    """Each is run below; this one, and what it starts, by tests/cli/test_run.py; the script by tests/patches."""
    assert COMMANDS[0] == "wallfacer run configs/tiny-cpu.yaml --train-iters 2"
    assert sum(command.startswith("scripts/apply_patch.sh MEGATRON_PATH") for command in COMMANDS) == 2
    assert len(COMMANDS) == 8


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("wallfacer")])
def test_a_documented_command_works(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to where it would start to train or ask Megatron, which tests of their own do."""
    launched: list[Launch] = []
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(Launch, "replace_this_process", lambda launch: launched.append(launch))
    for command_module in (config, run):
        monkeypatch.setattr(command_module, "check_presets", lambda *_: [CheckResult("0.19.2", (), None, True, True)])
    words = shlex.split(command)[1:]
    assert main(words) == 0
    assert len(launched) == (words[0] == "run" and "--dry-run" not in words)


def test_the_table_names_every_preset() -> None:
    for folder in ("model", "parallel", "train", "data", "env"):
        (row,) = re.findall(rf"^\| `configs/{folder}/` \| (.*) \|$", TEXT, flags=re.MULTILINE)
        assert set(re.findall(r"`([^`]+)`", row)) == {file.stem for file in (REPOSITORY / "configs" / folder).iterdir()}
    (row,) = re.findall(r"^\| `configs/\*\.yaml` \| (.*) \|$", TEXT, flags=re.MULTILINE)
    assert set(re.findall(r"`([^`]+)`", row)) == {file.stem for file in (REPOSITORY / "configs").glob("*.yaml")}


def test_the_example_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "mine.yaml").write_text(example)
    for folder in ("model", "env"):
        (tmp_path / folder).symlink_to(REPOSITORY / "configs" / folder)
    preset = load_preset(tmp_path / "mine.yaml")
    assert preset.argv[-6:] == ["--bf16", "--seq-length", "131072", "--recompute-modules", "core_attn", "mlp"]
    assert preset.environment["NCCL_DEBUG"] == "INFO"
