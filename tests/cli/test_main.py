"""The command itself: quick to answer, one line where it cannot do what it is asked."""

import signal
import subprocess
import sys

import pytest

from megatron_wallfacer.cli.main import main
from megatron_wallfacer.cli.training_log import Iteration, parse_iteration


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
    command = f"set -o pipefail; {sys.executable} -m megatron_wallfacer.cli.main completion bash | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


def test_a_missing_script_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--script", "/no/such/script.py"]) == 2
    assert capsys.readouterr().err.startswith("wallfacer: error: /no/such/script.py is not a file")


def test_a_grid_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--scheme", "nonsense"]) == 2
    assert "--scheme nonsense: must be one of auto" in capsys.readouterr().err


def test_an_iteration_is_read_from_megatrons_log() -> None:
    line = (
        " [2026-11-20 18:40:11.853359] iteration        2/       5 | consumed samples:            8 | "
        "elapsed time per iteration (ms): 393.6 | learning rate: 6.000000E-04 | global batch size:     4 | "
        "lm loss: 5.561522E+00 | loss scale: 1.0 | grad norm: 7.057 | number of skipped iterations:   0 |\n"
    )
    assert parse_iteration(line) == Iteration(2, 5.561522, 7.057)
    assert parse_iteration("anything else") is None
