"""From a preset to a command."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.needed_arguments import Libraries
from megatron_wallfacer.presets.launch import FLIGHT_RECORDER, Launch, choose_script
from megatron_wallfacer.presets.preset import Preset, load_preset
from megatron_wallfacer.shipped import CONFIGS, SCRIPT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def preset_of(folder: Path, torchrun: str) -> Preset:
    (folder / "p.yaml").write_text(f"ENV_VARS: {{A: a b}}\nTORCHRUN_ARGS: {{{torchrun}}}\nMODEL_ARGS: {{--x: it's}}\n")
    return load_preset(folder / "p.yaml")


def test_one_node_is_standalone(tmp_path: Path) -> None:
    launch = Launch.of(preset_of(tmp_path, "--nproc-per-node: 2"), Path("script.py"))
    expected = [
        *TORCHRUN,
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "megatron_wallfacer",
        "script.py",
        "--x",
        "it's",
    ]
    assert list(launch.command) == expected
    observer = [f"{name}={value}" for name, value in FLIGHT_RECORDER.items()]
    assert shlex.split(str(launch)) == ["env", *observer, "A=a b", *expected]


def test_the_flight_recorder_is_the_users_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    environment = Launch.of(preset_of(tmp_path, "--nproc-per-node: 2"), Path("script.py")).environment
    assert environment.keys() == {*FLIGHT_RECORDER, "A"} - {"TORCH_FR_BUFFER_SIZE"}


def test_restarts_have_a_store_of_their_own(tmp_path: Path) -> None:
    """Over gloo a restart fails in the store of the attempt before it."""
    name = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    assert Launch.of(preset_of(tmp_path, "--max-restarts: 2"), Path("s.py")).environment[name] == "1"
    assert name not in Launch.of(preset_of(tmp_path, "--max-restarts: 0"), Path("s.py")).environment
    assert name not in Launch.of(preset_of(tmp_path, "--nproc-per-node: 1"), Path("s.py")).environment


def test_several_nodes_have_to_meet(tmp_path: Path) -> None:
    preset = preset_of(tmp_path, "--nnodes: 2")
    with pytest.raises(WallfacerError) as caught:
        Launch.of(preset, Path("script.py"))
    assert str(caught.value).startswith(f"{tmp_path}/p.yaml:2: --nnodes 2: needs --rdzv-endpoint HOST:PORT")
    preset = load_preset(preset.path, ["--rdzv-endpoint", "n1:29400"])
    words = list(Launch.of(preset, Path("script.py")).command[3:9])
    assert words == ["--nnodes", "2", "--rdzv-endpoint", "n1:29400", "--rdzv-backend", "c10d"]
    preset = load_preset(preset.path, ["--rdzv-endpoint", "n1:29400", "--rdzv-backend", "static"])
    assert Launch.of(preset, Path("script.py")).command.count("--rdzv-backend") == 1


def test_which_script(tmp_path: Path) -> None:
    assert choose_script(None, None) == SCRIPT
    checkout, script = tmp_path / "pretrain_gpt.py", tmp_path / "other.py"
    with pytest.raises(WallfacerError, match=r"pretrain_gpt\.py: must be a file; use --script"):
        choose_script(None, tmp_path)
    checkout.touch()
    script.touch()
    assert choose_script(None, tmp_path) == checkout
    assert choose_script(script, tmp_path) == script


def test_it_becomes_the_command() -> None:
    """Its environment and exit code are the command's, and a signal reaches the command itself."""
    code = (
        "import os, sys; from megatron_wallfacer.presets.launch import Launch; before = os.getpid(); "
        'inner = f\'import os, signal; assert os.getpid() == {before} and os.environ["A"] == "1"; '
        "os.kill({before}, signal.SIGUSR1)'; Launch((sys.executable, '-c', inner), {'A': '1'}).replace_this_process()"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGUSR1


def test_a_shipped_preset_for_gpus_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the libraries that are here; what the user wrote or typed stays, and so does a preset for the CPU."""
    monkeypatch.setattr(Libraries, "here", lambda: Libraries(False, False))

    def added(path: Path, *words: str) -> list[str]:
        preset = load_preset(path, [*words, "--rdzv-endpoint", "n1:29400"])
        command = Launch.of(preset, SCRIPT).command
        return list(command[command.index(str(SCRIPT)) + 1 + len(preset.argv) :])

    shipped = Path("llama3-8b-128k")
    assert added(shipped)[:2] == ["--transformer-impl", "local"]
    assert "--no-rope-fusion" in added(shipped)
    assert added(shipped, "--transformer-impl", "transformer_engine") == ["--no-gradient-accumulation-fusion"]
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: [{CONFIGS / 'llama3-8b-128k.yaml'}]\n")
    assert added(own) == added(Path("tiny-cpu")) == []
