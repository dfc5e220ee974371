"""``wallfacer config show`` and ``check``: what a preset says, from where, and whether Megatron would take it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_wallfacer.presets.check import Verdict, check_presets
from megatron_wallfacer.presets.launch import choose_script
from megatron_wallfacer.shipped import SCRIPT

if TYPE_CHECKING:
    from megatron_wallfacer.presets.entry import Setting
    from megatron_wallfacer.presets.preset import Preset


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``config``, with ``show`` and ``check``."""
    config = commands.add_parser("config", help="show or check a preset")
    actions = config.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print environment and arguments, and where each is written")
    check = actions.add_parser("check", help="ask the plugin's rules and Megatron's own parser whether it is good")
    for parser in (show, check):
        add_preset_arguments(parser)
        parser.add_argument("--json", action="store_true", help="print JSON")
    add_script_arguments(check)
    config.set_defaults(run=run_config, takes_flags=True)


def add_preset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command on presets takes; flags that are none of its own go to the preset."""
    parser.allow_abbrev = False
    parser.usage = f"{parser.prog} CONFIG [options] [--megatron-flag value ...]"
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, or a preset by name")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable; may be repeated"
    )


def add_script_arguments(parser: argparse.ArgumentParser) -> None:
    """Add which Megatron it is about."""
    parser.add_argument(
        "--megatron-path", type=Path, metavar="DIR", help="a Megatron-LM checkout (default: the installed)"
    )
    parser.add_argument(
        "--script", type=Path, help="Megatron script (default: the checkout's, or the repository's own)"
    )


def run_config(arguments: argparse.Namespace) -> int:
    """Show or check; the exit code is 1 where a check finds something."""
    from megatron_wallfacer.presets.preset import load_preset

    preset = load_preset(arguments.config, arguments.flags, arguments.env)
    if arguments.action == "show":
        print(_shown_as_json(preset) if arguments.json else _shown(preset))
        return 0
    checkout = checkout_of(arguments.script, arguments.megatron_path)
    verdict = check_presets([preset], checkout, script_to_read(arguments.script, checkout))[0]
    if arguments.json:
        print(_verdict_as_json(preset, verdict))
    else:
        print_problems(verdict)
        if not verdict.problems:
            print(_good(preset, verdict))
    return 1 if verdict.problems else 0


def print_problems(verdict: Verdict) -> None:
    """Print one line on stderr for each problem of a preset."""
    for problem in verdict.problems:
        print(f"wallfacer: error: {problem}", file=sys.stderr)


def script_to_read(script: Path | None, checkout: Path | None) -> Path | None:
    """Return the script whose own flags are good; None for the plugin's own script, which adds none."""
    chosen = choose_script(script, None) if script or not checkout else checkout / "pretrain_gpt.py"
    return None if chosen == SCRIPT else chosen


def checkout_of(script: Path | None, megatron_path: Path | None) -> Path | None:
    """The folder whose Megatron will run: the named one, else the script's if it has one; None for the installed."""
    if megatron_path or not script:
        return megatron_path
    folder = choose_script(script, None).parent
    return folder if (folder / "megatron").is_dir() else None


def _shown(preset: Preset) -> str:
    """Three paragraphs of plain columns."""
    assigned = [(f"{name}={value}", preset.variables[name]) for name, value in preset.environment.items()]
    paragraphs = {
        "environment": assigned,
        "torchrun": _as_typed(preset.torchrun.values()),
        "arguments": _as_typed(preset.model.values()),
    }
    lines: list[str] = []
    for title, rows in paragraphs.items():
        if rows:
            lines += [f"# {title}", *(f"{text:<48} # {setting.origin}" for text, setting in rows)]
    return "\n".join(lines)


def _as_typed(settings: Iterable[Setting]) -> list[tuple[str, Setting]]:
    return [(shlex.join(setting.typed), setting) for setting in settings]


def _shown_as_json(preset: Preset) -> str:
    sections = (preset.variables, preset.torchrun, preset.model)
    shown = {
        "config": str(preset.path),
        "environment": preset.environment,
        "ranks": preset.ranks,
        "torchrun": [word for setting in preset.torchrun.values() for word in setting.typed],
        "argv": preset.argv,
        "origins": {name: str(setting.origin) for section in sections for name, setting in section.items()},
    }
    return json.dumps(shown, indent=2)


def _verdict_as_json(preset: Preset, verdict: Verdict) -> str:
    return json.dumps({"config": str(preset.path), "good": not verdict.problems, **asdict(verdict)}, indent=2)


def _good(preset: Preset, verdict: Verdict) -> str:
    asked = f"{preset.path}: good: megatron-core {verdict.megatron} takes its {len(preset.model)} flags"
    if not verdict.rules:
        return f"{asked}; without a model in it, the plugin's rules were not asked"
    if not verdict.grid:
        return f"{asked}; the plugin is off"
    kernel = "" if verdict.kernel else "; there is no GPU here, which kernel serves is seen where there is one"
    return f"{asked}; {preset.ranks} ranks, {verdict.grid}{kernel}"
