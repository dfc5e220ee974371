"""``wallfacer run``: train what a preset says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_wallfacer.cli.config import add_preset_arguments, add_script_arguments
from megatron_wallfacer.cli.presets.launch import Launch, choose_script
from megatron_wallfacer.cli.presets.preset import load_preset
from megatron_wallfacer.cli.presets.torchrun import FLAGS


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``run``."""
    run = commands.add_parser(
        "run", help="train what a preset says, under torchrun", epilog=f"Also torchrun's: {', '.join(FLAGS)}."
    )
    add_preset_arguments(run)
    add_script_arguments(run)
    run.add_argument("--dry-run", action="store_true", help="print the command, do not run it")


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Launch; does not return where it succeeds."""
    preset = load_preset(arguments.config, words, arguments.env)
    launch = Launch.of(preset, choose_script(arguments.script, arguments.megatron_path))
    if not arguments.dry_run:
        launch.replace_this_process()
    print(launch)
    return 0
