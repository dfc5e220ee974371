"""The program ``wallfacer``. It imports no heavy library before a command runs."""

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

#: Modules of the commands, in the order of the help. Each has ``add_parser(commands)``, which sets the function of the
#: command with ``set_defaults(run=...)``. ``takes_flags=True`` there: unknown flags are entries of a preset.
_COMMANDS = (run, config, plan, tune, bench, trace, view, doctor, demo, volume, schemes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program; None for those of the process.

    Returns:
        Exit code of the command; 2 after an error, with one line on stderr; 128 plus the number of the signal after an
        interrupt, or if the reader of the output has ended (``| head``).
    """
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The interpreter flushes stdout again when it ends.
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
    # Flags that no parser has are Megatron's.
    arguments, flags = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    if flags and not arguments.takes_flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    arguments.flags = flags
    return arguments.run(arguments)


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
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
