"""``wallfacer --print-completion``: shells run the script, and it completes commands, options, names and files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_wallfacer.cli import completion
from megatron_wallfacer.cli.main import command_parser, main
from megatron_wallfacer.planning.cluster_file import preset_names

#: Asks the function that `complete` has registered, as bash does.
ASK = r"""
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
function=$(complete -p wallfacer | sed 's/.* -F \([^ ]*\) .*/\1/')
"$function" wallfacer "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}" 2> /dev/null
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "wallfacer.bash"
    file.write_text(completion.completion_script(command_parser(), "bash"))
    return file


def completed(script: Path, *words: str, folder: Path | None = None) -> set[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, "bash", str(script), *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    return set(done.stdout.split())


def test_commands(bash: Path) -> None:
    assert completed(bash, "wallfacer", "pl") == {"plan"}
    assert {"run", "config", "doctor", "volume"} <= completed(bash, "wallfacer", "")
    assert completed(bash, "wallfacer", "--pr") == {"--print-completion"}


def test_options(bash: Path) -> None:
    assert completed(bash, "wallfacer", "plan", "--cl") == {"--cluster"}
    assert completed(bash, "wallfacer", "config", "sh") == {"show"}
    assert "--megatron-path" in completed(bash, "wallfacer", "config", "check", "--meg")


def test_names_and_choices(bash: Path, tmp_path: Path) -> None:
    assert completed(bash, "wallfacer", "plan", "--cluster", "h", folder=tmp_path) == {
        name for name in preset_names() if name.startswith("h")
    }
    assert "llama3-8b" in completed(bash, "wallfacer", "plan", "--model", "ll")
    assert "team-ring" in completed(bash, "wallfacer", "plan", "--scheme", "te")
    assert completed(bash, "wallfacer", "tune", "--dtype", "b") == {"bf16"}


def test_files(bash: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mega").mkdir()
    assert completed(bash, "wallfacer", "run", "mi", folder=tmp_path) == {"mine.yaml"}
    assert completed(bash, "wallfacer", "plan", "--cluster", "mi", folder=tmp_path) == {"mine.yaml"}
    assert completed(bash, "wallfacer", "doctor", "--megatron-path", "m", folder=tmp_path) == {"mega"}


def test_every_command_is_in_both(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in completion.SHELLS:
        with pytest.raises(SystemExit) as stopped:
            main(["--print-completion", shell])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        for name in ("plan", "doctor", "print-completion"):
            assert re.search(rf"\b{name}\b", text), (shell, name)
        assert str(Path.cwd()) not in text


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_reads_it(tmp_path: Path) -> None:
    (tmp_path / "_wallfacer").write_text(completion.completion_script(command_parser(), "zsh"))
    subprocess.run(["zsh", "-n", tmp_path / "_wallfacer"], check=True)


def test_a_missing_library_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        "wallfacer: error: --print-completion: needs the library shtab: pip install 'shtab>=1.7,<2'\n"
    )


def test_the_message_has_the_required_version() -> None:
    assert '"shtab>=1.7,<2"' in (Path(__file__).parents[2] / "setup.py").read_text()
