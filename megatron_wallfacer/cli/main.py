"""``wallfacer``: the commands a person types. Imports nothing heavy until a command runs."""

from __future__ import annotations

import argparse
import os
import signal
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
    trace,
    tune,
    words,
)
from megatron_wallfacer.doctor import process as doctor
from megatron_wallfacer.errors import WallfacerError

#: A module each, with ``add_parser(commands)``, which says by ``set_defaults(run=...)`` what the command runs.
#: ``takes_flags=True`` there: on a preset, with Megatron's flags beside its own. In the order of the help.
_COMMANDS = (run, config, plan, tune, bench, trace, page, doctor, demo, words, schemes, completion)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it did what it was asked; 2 with one line on stderr; 128 and the number of the signal where it was
        interrupted, or where nothing reads its output any more (``| head``).
    """
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except WallfacerError as error:
        print(f"wallfacer: error: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"wallfacer: error: {where}{error.strerror or error}", file=sys.stderr)
    return 2


def _run(argv: Sequence[str] | None) -> int:
    parser = command_parser()
    # Megatron's flags, which no parser here knows, are left over.
    arguments, flags = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    if flags and not arguments.takes_flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    arguments.flags = flags
    return arguments.run(arguments)


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
