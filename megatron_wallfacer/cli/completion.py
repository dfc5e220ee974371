"""``wallfacer completion``: a script with which a shell completes commands, options, names and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_wallfacer.errors import WallfacerError

SHELLS = ("bash", "zsh")
_CLUSTER_OR_FILE = "_wallfacer_cluster_or_file"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``completion``."""
    parser = commands.add_parser(
        "completion",
        help="print a script that makes a shell complete these commands",
        epilog='In ~/.bashrc: eval "$(wallfacer completion bash)"; in ~/.zshrc, after compinit, the same with zsh.',
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell")
    parser.set_defaults(run=run_completion)


def run_completion(arguments: argparse.Namespace) -> int:
    """Print it.

    Raises:
        WallfacerError: the library that writes it is not installed.
    """
    from megatron_wallfacer.cli.main import command_parser

    print(script(command_parser(), arguments.shell))
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a parser, whose actions are changed: they are told what completes them.

    Raises:
        WallfacerError: the library that writes it is not installed.
    """
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise WallfacerError("completion: needs the library shtab: pip install 'shtab>=1.7,<2'") from error
    names = _names()
    for action in _actions(parser):
        if action.dest in names:
            action.choices = names[action.dest]
            # A cluster may be a file; zsh is told the names only.
            if action.dest == "cluster" and shell == "bash":
                action.complete = {"bash": _CLUSTER_OR_FILE}
        elif action.metavar == "DIR" or action.dest == "directory":
            action.complete = shtab.DIRECTORY
        elif action.type is Path:
            action.complete = shtab.FILE
    both = f'{_CLUSTER_OR_FILE}() {{ compgen -W "{" ".join(names["cluster"])}" -- "$1"; compgen -f -- "$1"; }}'
    return shtab.complete(parser, shell, preamble={"bash": both})


def _names() -> dict[str, tuple[str, ...]]:
    """Words that an option takes and its parser does not check, by the option: the command itself does, later."""
    from megatron_wallfacer.planning.cluster_file import preset_names
    from megatron_wallfacer.planning.model import MODELS, RECOMPUTE
    from megatron_wallfacer.schedule.schemes import SCHEMES

    return {"cluster": preset_names(), "model": tuple(MODELS), "recompute": RECOMPUTE, "scheme": tuple(SCHEMES)}


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of a parser and of those below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
