"""Implement the program ``wallfacer``, which imports no slow library before a command runs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from megatron_wallfacer import __version__
from megatron_wallfacer.cli import bench, config, demo, doctor, plan, run, schemes, trace, tune, view, volume
from megatron_wallfacer.cli.completion import PrintCompletion
from megatron_wallfacer.errors import WallfacerError

#: Modules of the commands in the order of the help. Each module has a function ``add_parser(commands)``, which sets the
#: command's function with ``set_defaults(run=...)``. The function returns the exit code, and raises WallfacerError for
#: an invalid request. With ``takes_flags=True`` unknown flags become preset entries.
_COMMANDS = (run, config, plan, tune, bench, trace, view, doctor, demo, volume, schemes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the name of the program, or None for the arguments of the process.

    Returns:
        The exit code of the command. After an error the exit code is 2, with one line on stderr. After an interrupt
        (SIGINT) or a closed pipe (SIGPIPE, as with ``| head``), the exit code is 128 plus the number of the signal.
    """
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The interpreter flushes stdout again at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except WallfacerError as error:
        print(f"wallfacer: error: {error}", file=sys.stderr)
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        print(f"wallfacer: error: {place}{error.strerror or error}", file=sys.stderr)
    return 2


def _run(argv: Sequence[str] | None) -> int:
    parser = command_parser()
    # Unknown flags are Megatron's.
    arguments, flags = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    if flags and not arguments.takes_flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    arguments.flags = flags
    return arguments.run(arguments)


def command_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    parser = argparse.ArgumentParser(prog="wallfacer", description="Multi-dimensional ring attention for Megatron-LM.")
    parser.add_argument("--version", action="version", version=f"megatron-wallfacer {__version__}")
    parser.add_argument("--print-completion", action=PrintCompletion)
    parser.set_defaults(takes_flags=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in _COMMANDS:
        module.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
