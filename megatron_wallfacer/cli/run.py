"""Implement ``wallfacer run``: run the training job of a preset."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_wallfacer.cli.config import add_preset_arguments, add_script_arguments, print_problems
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets import torchrun
from megatron_wallfacer.presets.check import CheckResult, check_presets
from megatron_wallfacer.presets.launch import Launch, checkout_of, choose_script, script_to_read
from megatron_wallfacer.presets.shared_gpus import sharing_on_this_node

if TYPE_CHECKING:
    from megatron_wallfacer.presets.preset import Preset


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``run``."""
    parser = commands.add_parser(
        "run", help="run the training job of a preset", epilog=f"Flags of torchrun: {', '.join(torchrun.FLAGS)}."
    )
    add_preset_arguments(parser)
    add_script_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the command without running it")
    parser.add_argument("--json", action="store_true", help="with --dry-run: print JSON")
    parser.set_defaults(run=run_run, takes_flags=True)


def run_run(arguments: argparse.Namespace) -> int:
    """Check the flags and start torchrun, which replaces this process.

    Returns:
        The exit code: 2 if Megatron or the plugin does not support a flag, or 0 after ``--dry-run``.
    """
    from megatron_wallfacer.presets.preset import load_preset

    if arguments.json and not arguments.dry_run:
        raise WallfacerError("--json: needs --dry-run; without it Megatron prints its own log")
    preset = load_preset(arguments.config, arguments.flags, arguments.env)
    launch = Launch.of(preset, choose_script(arguments.script, arguments.megatron_path))
    result = _check(preset, arguments)
    if result and result.problems:
        print_problems(result)
        return 2
    ranks, environment = torchrun.ranks_per_node(preset.torchrun), os.environ | preset.environment
    sharing = sharing_on_this_node(ranks, preset.argv, environment)
    if sharing.line:
        print(f"wallfacer: {sharing.line}", file=sys.stderr, flush=True)
    launch = Launch((*launch.command, *sharing.flags), launch.environment | sharing.environment)
    if not arguments.dry_run:
        launch.replace_this_process()
    print(json.dumps(asdict(launch), indent=2) if arguments.json else launch)
    return 0


def _check(preset: Preset, arguments: argparse.Namespace) -> CheckResult | None:
    """Check the flags once per job, not once per rank. Return None if this node has no Megatron."""
    if os.environ.get("SLURM_NODEID", "0") != "0":
        return None  # The first node checks. After an error srun ends the other nodes.
    try:
        checkout = checkout_of(arguments.script, arguments.megatron_path)
        return check_presets([preset], checkout, script_to_read(arguments.script, checkout))[0]
    except WallfacerError as error:
        print(f"wallfacer: flags are not checked before the launch: {error}", file=sys.stderr, flush=True)
        return None
