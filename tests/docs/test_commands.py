"""Every command of the pages is run, here or by a test that is named, or has a reason why none can run it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from megatron_wallfacer.cli.main import main
from tests.docs.commands import ELSEWHERE, HERE
from tests.docs.pages import PAGES, ROOT, commands

FOUND = {command: page.relative_to(ROOT) for page in PAGES for command in commands(page.read_text())}
HOW = (
    "tests/docs/commands.py: put it in HERE (run as it is typed, seconds) or in ELSEWHERE with the test that "
    "runs it or the reason why none can"
)


def test_every_command_is_accounted_for() -> None:
    known = {*HERE, *ELSEWHERE}
    unknown = {command: str(page) for command, page in FOUND.items() if command not in known}
    assert not unknown, f"{unknown}\n{HOW}"


def test_nothing_is_listed_that_no_page_has() -> None:
    stale = {*HERE, *ELSEWHERE} - FOUND.keys()
    assert not stale, f"no page has {sorted(stale)}"


def test_no_command_is_listed_twice() -> None:
    assert not set(HERE) & ELSEWHERE.keys()


def test_the_tests_that_are_named_exist() -> None:
    for command, reason in ELSEWHERE.items():
        for name in re.findall(r"tests/[\w/.]+\w", reason):
            assert (ROOT / name).exists(), f"{command}: {name}"


@pytest.mark.parametrize("command", HERE)
def test_a_command_does_what_it_is_typed_for(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(command)
    if program == "python":
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        return
    assert program == "wallfacer"
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip()


def test_commands_are_found_in_every_form() -> None:
    page = """Prose, `make nothing`.

    A=1 B="x y" scripts/a.sh \\
        --flag    # why
    output

```
$ wallfacer volume
wallfacer    team 2
```

```python
# torchrun is a comment
```

    .venv/bin/wallfacer doctor
    wallfacer: error: is output
"""
    assert list(commands(page)) == ['A=1 B="x y" scripts/a.sh --flag', "wallfacer volume", "wallfacer doctor"]
