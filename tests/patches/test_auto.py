"""``import megatron_wallfacer.auto``: in a script that is run by itself, it is what the launcher is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What a Megatron script does, as far as the plugin can see it.
SCRIPT = """
import megatron_wallfacer.auto
import sys
from megatron.training.arguments import parse_args
args = parse_args()
print("parsed", args.context_parallel_size, args.transformer_impl, "--transformer-impl" in sys.argv)
"""
MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --attention-dropout 0".split()
ON = ["--wallfacer-cp-size", "2"]


def run(folder: Path, *words: str, launcher: bool = False, text: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(text)
    command = [sys.executable, "-W", "ignore", *(["-m", "megatron_wallfacer"] if launcher else []), str(script)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2", "RANK": "0"}
    return subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("launcher", [False, True], ids=["by itself", "under the launcher"])
def test_the_plugin_is_in(tmp_path: Path, launcher: bool) -> None:
    """Also where the launcher runs a patched script: once."""
    done = run(tmp_path, *MODEL, *ON, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "parsed 2 local True"
    assert done.stdout.count("wallfacer: no CUDA here: 2 ranks on the CPU over gloo") == 1


def test_an_error_is_one_line_before_and_after_the_script_has_begun(tmp_path: Path) -> None:
    for words, message in (
        (["--fp8-format", "e4m3"], "--fp8-format e4m3 needs CUDA"),  # at the import
        (["--wallfacer-cp-size", "3"], "--wallfacer-cp-size 3 on "),  # when Megatron parses
    ):
        done = run(tmp_path, *MODEL, *words)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        (line,) = (line for line in done.stderr.splitlines() if "error" in line)
        assert line.startswith(f"wallfacer: error: rank 0: {message}")


def test_what_is_not_the_plugins_to_explain_keeps_its_traceback(tmp_path: Path) -> None:
    done = run(tmp_path, *MODEL, text="import megatron_wallfacer.auto\nint('x')\n")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: invalid literal for int()" in done.stderr
    assert "wallfacer: error" not in done.stderr


def test_a_megatron_that_is_not_known_is_rejected(tmp_path: Path) -> None:
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 3\nPATCH = 1\n")
    done = run(tmp_path, *MODEL)
    assert done.returncode == 2
    assert "wallfacer: error: rank 0: megatron-core 0.3.1 is not supported" in done.stderr
