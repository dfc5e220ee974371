"""Tables of docs/planning.md are what the commands above them print."""

from __future__ import annotations

import re
import shlex

import pytest

from megatron_wallfacer.cli.main import main
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "planning.md").read_text()
#: Commands with what they print.
SHOWN = re.findall(r"^```\n\$ wallfacer (.*)\n([^`]*)```$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("command", "expected"), SHOWN, ids=[command for command, _ in SHOWN])
def test_a_command_prints_what_the_page_shows(command: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == expected


def test_the_target_is_shown() -> None:
    """Two rows at least whose MFU is 40 % or more within 80 GB, with flags that tests cover."""
    (table,) = [text for command, text in SHOWN if "--model llama3-8b --seq 1M" in command]
    rows = [line for line in table.splitlines() if re.match(r" *\d+  ", line) and "not tested here" not in line]
    figures = [re.search(r"([\d.]+)  (?:\w+) +(\d+) +([\d.]+) +([\d.]+)", row).groups() for row in rows]
    good = [row for row in figures if float(row[0]) <= 80 and float(row[1]) <= 2000 and float(row[3]) >= 40]
    assert len(good) >= 2
