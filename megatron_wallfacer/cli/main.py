"""``wallfacer``: the commands a person types. Imports nothing heavy until a command runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_wallfacer import __version__
from megatron_wallfacer.cli import (
    bench,
    completion,
    config,
    demo,
    page,
    plan,
    run,
    schemes,
    simulate,
    trace,
    tune,
    words,
)
from megatron_wallfacer.cli.doctor import command as doctor
from megatron_wallfacer.errors import WallfacerError

#: A module each, with ``add_parser(commands)``, which says by ``set_defaults(run=...)`` what the command runs.
#: ``takes_flags=True`` there: on a preset, with Megatron's flags beside its own. In the order of the help.
_COMMANDS = (run, config, plan, tune, bench, simulate, trace, page, doctor, demo, words, schemes, completion)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 if it did what it was asked."""
    parser = command_parser()
    # Megatron's flags, which no parser here knows, are left over.
    arguments, flags = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    if flags and not arguments.takes_flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    arguments.flags = flags
    try:
        return arguments.run(arguments)
    except WallfacerError as error:
        print(f"wallfacer: error: {error}", file=sys.stderr)
        return 2


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="wallfacer", description="Multi-dimensional ring attention for Megatron-LM.")
    parser.add_argument("--version", action="version", version=f"megatron-wallfacer {__version__}")
    parser.set_defaults(takes_flags=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in _COMMANDS:
        module.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
