"""Implement ``wallfacer --print-completion``, which prints a shell's completion script made by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_wallfacer.errors import WallfacerError

SHELLS = ("bash", "zsh")
_CLUSTER_OR_FILE = "_wallfacer_cluster_or_file"


class PrintCompletion(argparse.Action):
    """An argparse action that prints the completion script and imports shtab only if the action is used."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        example = f'eval "$(wallfacer {option_strings[0]} bash)"'
        super().__init__(option_strings, dest, choices=SHELLS, help=f"print a completion script; ~/.bashrc: {example}")

    def __call__(self, parser: argparse.ArgumentParser, _: argparse.Namespace, shell: Any, *__: Any) -> None:
        """Print the script and exit."""
        print(completion_script(parser, shell))
        parser.exit()


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script of a parser. The function adds choices to the parser's arguments.

    Raises:
        WallfacerError: shtab is not installed.
    """
    from megatron_wallfacer.planning.cluster_file import preset_names
    from megatron_wallfacer.planning.model import MODELS, RECOMPUTE
    from megatron_wallfacer.schedule.schemes import SCHEMES

    try:
        import shtab
    except ModuleNotFoundError as error:
        raise WallfacerError("--print-completion: needs the library shtab: pip install 'shtab>=1.7,<2'") from error
    # Allowed values of options that have no argparse choices.
    names = {"cluster": preset_names(), "model": tuple(MODELS), "recompute": RECOMPUTE, "scheme": tuple(SCHEMES)}
    for action in _actions(parser):
        if action.dest in names:
            action.choices = names[action.dest]
            # A cluster may be a file, which only the bash function below completes.
            if action.dest == "cluster" and shell == "bash":
                action.complete = {"bash": _CLUSTER_OR_FILE}
        elif action.metavar == "DIR" or action.dest == "directory":
            action.complete = shtab.DIRECTORY
        elif action.type is Path:
            action.complete = shtab.FILE
    function = f'{_CLUSTER_OR_FILE}() {{ compgen -W "{" ".join(names["cluster"])}" -- "$1"; compgen -f -- "$1"; }}'
    return shtab.complete(parser, shell, preamble={"bash": function})


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from _actions(subparser)
