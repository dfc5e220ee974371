"""``wallfacer``: the commands a person types. Imports nothing heavy until a command runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_wallfacer import __version__
from megatron_wallfacer.cli import config, plan, run, simulate, tune
from megatron_wallfacer.errors import WallfacerError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 if it did what it was asked."""
    parser = _parser()
    # Commands on presets take Megatron's flags too, which no parser here knows.
    arguments, flags = parser.parse_known_args(argv)
    if flags and arguments.command not in _PRESET_COMMANDS:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        if arguments.command in _PRESET_COMMANDS:
            return _PRESET_COMMANDS[arguments.command](arguments, flags)
        return _COMMANDS[arguments.command](arguments)
    except WallfacerError as error:
        print(f"wallfacer: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wallfacer", description="Multi-dimensional ring attention for Megatron-LM.")
    parser.add_argument("--version", action="version", version=f"megatron-wallfacer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser("demo", help="train a small GPT with and without context parallelism, and compare")
    demo.add_argument("--directory", type=Path, default=Path("runs/demo"), help="where to leave data, logs, pictures")
    demo.add_argument("--cp-size", type=int, default=8, help="context-parallel ranks (default: 8)")
    demo.add_argument("--scheme", default="auto", help="as --wallfacer-scheme (default: auto)")
    demo.add_argument("--iterations", type=int, default=20, help="training iterations (default: 20)")
    demo.add_argument("--script", type=Path, help="Megatron script to run (default: this repository's own)")
    words = commands.add_parser("words", help="count what each scheme makes a rank receive, against the lower bound")
    words.add_argument("--cp-size", type=int, nargs="+", metavar="P", help="sizes (default: 16 64 256 1024)")
    words.add_argument("--group", type=int, nargs="+", metavar="N", help="q heads to a kv head (default: 1 4 8)")
    words.add_argument("--q-heads", type=int, default=64, metavar="N", help="query heads of a rank (default: 64)")
    words.add_argument("--json", action="store_true", help="print JSON")
    schemes = commands.add_parser("schemes", help="list the schemes: grid, words, messages and buffers at one size")
    schemes.add_argument("--cp-size", type=int, default=16, metavar="P", help="context-parallel ranks (default: 16)")
    schemes.add_argument("--q-heads", type=int, default=32, metavar="N", help="query heads of a rank (default: 32)")
    schemes.add_argument("--kv-heads", type=int, default=8, metavar="N", help="kv heads of a rank (default: 8)")
    schemes.add_argument("--json", action="store_true", help="print JSON")
    plan.add_parser(commands)
    simulate.add_parser(commands)
    tune.add_parser(commands)
    run.add_parser(commands)
    config.add_parsers(commands)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from megatron_wallfacer.cli.demo import Demo

    demo = Demo(
        directory=arguments.directory,
        cp_size=arguments.cp_size,
        scheme=arguments.scheme,
        iterations=arguments.iterations,
        script=arguments.script,
    )
    return demo.run()


def _words(arguments: argparse.Namespace) -> int:
    from megatron_wallfacer.cli.words import GROUPS, SIZES, as_json, as_table, rows

    found = rows(arguments.cp_size or SIZES, arguments.group or GROUPS, arguments.q_heads)
    print(as_json(found) if arguments.json else as_table(found))
    return 0


def _schemes(arguments: argparse.Namespace) -> int:
    from megatron_wallfacer.cli.schemes import as_table, rows
    from megatron_wallfacer.cli.words import as_json

    found = rows(arguments.cp_size, arguments.q_heads, arguments.kv_heads)
    print(as_json(found) if arguments.json else as_table(found))
    return 0


_COMMANDS = {
    "demo": _demo,
    "words": _words,
    "schemes": _schemes,
    "plan": plan.run_plan,
    "simulate": simulate.run_simulate,
    "tune": tune.run_tune,
}
_PRESET_COMMANDS = {"run": run.run, "config": config.run_config}


if __name__ == "__main__":
    sys.exit(main())
