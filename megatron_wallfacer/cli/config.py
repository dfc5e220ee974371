"""Implement ``wallfacer config show`` and ``check``: print or check the entries of a preset, with file and line."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_wallfacer.presets.check import CheckResult, check_presets
from megatron_wallfacer.presets.launch import checkout_of, script_to_read

if TYPE_CHECKING:
    from megatron_wallfacer.presets.entry import PresetEntry
    from megatron_wallfacer.presets.preset import Preset


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``config`` with the actions ``show`` and ``check``."""
    config = commands.add_parser("config", help="show or check a preset")
    actions = config.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print environment and arguments with their locations")
    check = actions.add_parser("check", help="check a preset with Megatron's own parser and the plugin's rules")
    for parser in (show, check):
        add_preset_arguments(parser)
        parser.add_argument("--json", action="store_true", help="print JSON")
    add_script_arguments(check)
    config.set_defaults(run=run_config, takes_flags=True)


def add_preset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all commands with a preset have. Unknown flags become entries of the preset."""
    parser.allow_abbrev = False
    parser.usage = f"{parser.prog} CONFIG [options] [--megatron-flag value ...]"
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, or name of a preset")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable to set; may be repeated"
    )


def add_script_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select the Megatron checkout and its script."""
    parser.add_argument(
        "--megatron-path", type=Path, metavar="DIR", help="Megatron-LM checkout (default: installed Megatron)"
    )
    parser.add_argument("--script", type=Path, help="Megatron script (default: that of the checkout or of the plugin)")


def run_config(arguments: argparse.Namespace) -> int:
    """Show or check a preset, and return 1 if the check finds a problem, else 0."""
    from megatron_wallfacer.presets.preset import load_preset

    preset = load_preset(arguments.config, arguments.flags, arguments.env)
    if arguments.action == "show":
        print(_shown_as_json(preset) if arguments.json else _shown(preset))
        return 0
    checkout = checkout_of(arguments.script, arguments.megatron_path)
    result = check_presets([preset], checkout, script_to_read(arguments.script, checkout))[0]
    if arguments.json:
        entries = {"config": str(preset.path), "valid": not result.problems, **asdict(result)}
        print(json.dumps(entries, indent=2))
    else:
        print_problems(result)
        if not result.problems:
            print(_summary(preset, result))
    return 1 if result.problems else 0


def print_problems(result: CheckResult) -> None:
    """Print a line on stderr for each problem."""
    for problem in result.problems:
        print(f"wallfacer: error: {problem}", file=sys.stderr)


def _shown(preset: Preset) -> str:
    assigned = [(f"{name}={value}", preset.variables[name]) for name, value in preset.environment.items()]
    paragraphs = {
        "environment": assigned,
        "torchrun": _as_arguments(preset.torchrun.values()),
        "arguments": _as_arguments(preset.model.values()),
    }
    lines: list[str] = []
    for title, rows in paragraphs.items():
        if rows:
            lines += [f"# {title}", *(f"{text:<48} # {entry.location}" for text, entry in rows)]
    lines += [f"# {name}: {text}" for name, texts in preset.statements.items() for text in texts]
    return "\n".join(lines)


def _as_arguments(entries: Iterable[PresetEntry]) -> list[tuple[str, PresetEntry]]:
    return [(shlex.join(entry.arguments), entry) for entry in entries]


def _shown_as_json(preset: Preset) -> str:
    sections = (preset.variables, preset.torchrun, preset.model)
    shown = {
        "config": str(preset.path),
        "environment": preset.environment,
        "ranks": preset.ranks,
        "torchrun": [argument for entry in preset.torchrun.values() for argument in entry.arguments],
        "argv": preset.argv,
        **preset.statements,
        "locations": {name: str(entry.location) for section in sections for name, entry in section.items()},
    }
    return json.dumps(shown, indent=2)


def _summary(preset: Preset, result: CheckResult) -> str:
    text = f"{preset.path}: valid: megatron-core {result.megatron} supports its {len(preset.model)} flags"
    if not result.rules:
        return f"{text}; the plugin's rules were not checked, because the preset has no model"
    if not result.grid:
        return f"{text}; the plugin is off"
    kernel = "" if result.kernel else "; the kernel was not checked, because this node has no GPU"
    return f"{text}; {preset.ranks} ranks, {result.grid}{kernel}"
