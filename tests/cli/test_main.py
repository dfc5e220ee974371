"""The program: it starts quickly, and each error is one line."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_wallfacer.cli.main import main
from megatron_wallfacer.cli.outputs import check_output
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.training_runs.training_log import Iteration, parse_iteration


def test_help_imports_neither_torch_nor_megatron() -> None:
    code = "import sys; from megatron_wallfacer.cli.main import main; main([]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device", "/x/out.json"), 2, "wallfacer: error: /x/out.json: No space left on"),
        (PermissionError(13, "Permission denied"), 2, "wallfacer: error: Permission denied"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_of_the_system_is_one_line(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setattr("megatron_wallfacer.cli.schemes.run_schemes", fail)
    assert main(["schemes"]) == code
    told = capsys.readouterr().err
    assert told.startswith(said)
    assert told.count("\n") == (1 if said else 0)


def test_a_pipe_that_is_closed_ends_quietly() -> None:
    """Its reader ends at once: before the command has written anything."""
    command = f"set -o pipefail; {sys.executable} -m megatron_wallfacer.cli.main --print-completion bash | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


def test_a_missing_script_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--script", "/no/such/script.py"]) == 2
    assert capsys.readouterr().err.startswith("wallfacer: error: --script /no/such/script.py: must be a file")


def test_a_grid_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--scheme", "nonsense"]) == 2
    assert "--scheme nonsense: must be one of auto" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("--cp-size", "0"), ("--cp-size", "-2"), ("--iterations", "0")])
def test_a_demonstration_of_nothing_is_one_line(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", flag, value]) == 2
    assert capsys.readouterr() == ("", f"wallfacer: error: {flag} {value}: must be a positive number\n")


def test_an_iteration_is_read_from_megatrons_log() -> None:
    line = (
        " [2026-11-20 18:40:11.853359] iteration        2/       5 | consumed samples:            8 | "
        "elapsed time per iteration (ms): 393.6 | learning rate: 6.000000E-04 | global batch size:     4 | "
        "lm loss: 5.561522E+00 | loss scale: 1.0 | grad norm: 7.057 | number of skipped iterations:   0 |\n"
    )
    assert parse_iteration(line) == Iteration(2, 5.561522, 7.057)
    assert parse_iteration("anything else") is None


#: Commands and flags of the files that they write.
OUTPUTS = (
    ("plan", "--save"),
    ("plan", "--trace"),
    ("plan", "--plot"),
    ("plan --scheme ring", "--trace"),
    ("view", "--out"),
    ("tune", "--cluster-out"),
    ("tune", "--save"),
    ("trace .", "--out"),
)


@pytest.mark.parametrize(("command", "flag"), OUTPUTS, ids=lambda value: value)
@pytest.mark.parametrize("path", ["/proc/no/file", "/dev/null/file"], ids=repr)
def test_outputs_are_checked_before_the_work(
    command: str, flag: str, path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may write anywhere but there."""
    monkeypatch.setenv("RANK", "0")
    works = ("planning.cluster_file.load_cluster", "plots.viewer.data.page_data", "tuning.job.process_group")
    for work in (*works, "traces.timelines.read_timelines"):
        monkeypatch.setattr(f"megatron_wallfacer.{work}", lambda *_, **__: pytest.fail("the work has begun"))
    assert main([*command.split(), flag, path]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"wallfacer: error: {flag} ")
    assert ": cannot be written: " in said.err
    assert said.err.count("\n") == 1


def test_a_name_that_is_none_is_one_line() -> None:
    with pytest.raises(WallfacerError, match=r"^--save 'a\\x00b': cannot be written: embedded null byte$"):
        check_output("--save", Path("a\0b"))


def test_a_checked_output_is_left_as_it_was(tmp_path: Path) -> None:
    there, new = tmp_path / "there", tmp_path / "folder" / "new"
    there.write_text("kept")
    for path in (there, new, Path("/dev/null"), None):
        check_output("--out", path)
    assert there.read_text() == "kept"
    assert list(new.parent.iterdir()) == []


def test_a_disk_that_is_full_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the check, when the file is written."""
    assert main(["view", "--cp-size", "2", "--out", "/dev/full"]) == 2
    assert capsys.readouterr() == ("", "wallfacer: error: No space left on device\n")
