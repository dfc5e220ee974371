"""``wallfacer run``: train what a preset says."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict

from megatron_wallfacer.cli.config import add_preset_arguments, add_script_arguments
from megatron_wallfacer.cli.presets import torchrun
from megatron_wallfacer.cli.presets.launch import Launch, choose_script
from megatron_wallfacer.cli.sharing import sharing_here
from megatron_wallfacer.errors import WallfacerError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``run``."""
    parser = commands.add_parser(
        "run", help="train what a preset says, under torchrun", epilog=f"Also torchrun's: {', '.join(torchrun.FLAGS)}."
    )
    add_preset_arguments(parser)
    add_script_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the command, do not run it")
    parser.add_argument("--json", action="store_true", help="with --dry-run: print JSON")
    parser.set_defaults(run=run_run, takes_flags=True)


def run_run(arguments: argparse.Namespace) -> int:
    """Launch; does not return where it succeeds.

    Raises:
        WallfacerError: the preset or an option is wrong.
    """
    from megatron_wallfacer.cli.presets.preset import load_preset

    if arguments.json and not arguments.dry_run:
        raise WallfacerError("--json: must be with --dry-run; what is trained prints as Megatron does")
    preset = load_preset(arguments.config, arguments.flags, arguments.env)
    launch = Launch.of(preset, choose_script(arguments.script, arguments.megatron_path))
    sharing = sharing_here(torchrun.ranks_per_node(preset.torchrun), preset.argv, os.environ | preset.environment)
    if sharing.line:
        print(f"wallfacer: {sharing.line}", file=sys.stderr, flush=True)
    launch = Launch((*launch.command, *sharing.flags), launch.environment | sharing.environment)
    if not arguments.dry_run:
        launch.replace_this_process()
    print(json.dumps(asdict(launch), indent=2) if arguments.json else launch)
    return 0
