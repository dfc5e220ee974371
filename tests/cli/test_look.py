"""Properties of every command: help for each option, JSON for each table, and a quick start."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megatron_wallfacer.cli.main import command_parser, main

HEAVY = ("torch", "numpy", "matplotlib", "rich", "yaml", "psutil", "shtab")
#: Commands without a table: a group of commands, and one that writes a page.
WITHOUT_JSON = {"config", "view"}


def parsers(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """All commands and their commands, by what is typed."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield (*words, name), below
                yield from parsers(below, (*words, name))


COMMANDS = dict(parsers(command_parser()))
each_command = pytest.mark.parametrize("words", COMMANDS, ids=" ".join)


def test_there_are_these() -> None:
    assert {"run", "config", "plan", "tune", "bench", "doctor", "demo", "volume", "view", "schemes"} <= {
        words[0] for words in COMMANDS
    }
    assert {("config", "show"), ("config", "check")} <= set(COMMANDS)


@each_command
def test_help_works(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: wallfacer {' '.join(words)}")


@each_command
def test_each_option_has_a_help_text(words: tuple[str, ...]) -> None:
    without = [
        action.option_strings or action.dest
        for action in COMMANDS[words]._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert not without


def test_each_command_has_a_help_text() -> None:
    parser = command_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    assert {choice.dest for choice in commands._choices_actions if choice.help} == set(commands.choices)


@each_command
def test_what_prints_a_table_prints_json(words: tuple[str, ...]) -> None:
    if words[0] not in WITHOUT_JSON or len(words) > 1:
        assert "--json" in COMMANDS[words]._option_string_actions


@each_command
def test_each_command_sets_its_function(words: tuple[str, ...]) -> None:
    defaults = COMMANDS[words[:1]]._defaults
    assert callable(defaults["run"])


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from megatron_wallfacer.cli.main import main\n"
        "try: main(['--help'])\n"
        f"finally: print('heavy:', *(name for name in {HEAVY} if name in sys.modules))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "COMMAND" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy:"
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 0.5
