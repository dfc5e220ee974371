"""The command itself: quick to answer, one line where it cannot do what it is asked."""

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
