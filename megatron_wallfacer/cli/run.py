"""``wallfacer run``: train what a preset says."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_wallfacer.cli.config import (
    add_preset_arguments,
    add_script_arguments,
    checkout_of,
    print_problems,
    script_to_read,
)
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets import torchrun
from megatron_wallfacer.presets.check import Verdict, check_presets
from megatron_wallfacer.presets.launch import Launch, choose_script
from megatron_wallfacer.presets.shared_gpus import sharing_here

if TYPE_CHECKING:
    from megatron_wallfacer.presets.preset import Preset


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
    """Launch; does not return where it succeeds. The exit code is 2 where Megatron or the plugin would not take a flag.

    Raises:
        WallfacerError: the preset or an option is wrong.
    """
    from megatron_wallfacer.presets.preset import load_preset

    if arguments.json and not arguments.dry_run:
        raise WallfacerError("--json: must be with --dry-run; what is trained prints as Megatron does")
    preset = load_preset(arguments.config, arguments.flags, arguments.env)
    launch = Launch.of(preset, choose_script(arguments.script, arguments.megatron_path))
    verdict = _verdict_before_launch(preset, arguments)
    if verdict and verdict.problems:
        print_problems(verdict)
        return 2
    sharing = sharing_here(torchrun.ranks_per_node(preset.torchrun), preset.argv, os.environ | preset.environment)
    if sharing.line:
        print(f"wallfacer: {sharing.line}", file=sys.stderr, flush=True)
    launch = Launch((*launch.command, *sharing.flags), launch.environment | sharing.environment)
    if not arguments.dry_run:
        launch.replace_this_process()
    print(json.dumps(asdict(launch), indent=2) if arguments.json else launch)
    return 0


def _verdict_before_launch(preset: Preset, arguments: argparse.Namespace) -> Verdict | None:
    """What Megatron's parser says, once per job and not once per rank; None where there is no Megatron to ask here."""
    if os.environ.get("SLURM_NODEID", "0") != "0":
        return None  # the first node of the job asks, and srun ends the others with it
    try:
        checkout = checkout_of(arguments.script, arguments.megatron_path)
        return check_presets([preset], checkout, script_to_read(arguments.script, checkout))[0]
    except WallfacerError as error:
        print(f"wallfacer: flags are not checked before the launch: {error}", file=sys.stderr, flush=True)
        return None
