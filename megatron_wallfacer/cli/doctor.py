"""Implement ``wallfacer doctor``: check whether training can run on this node."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_wallfacer.cli.table import as_json
from megatron_wallfacer.doctor.finding import Finding
from megatron_wallfacer.doctor.process import run_checks
from megatron_wallfacer.presets.check import environment_for

_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``doctor``."""
    parser = commands.add_parser("doctor", help="check this node: problems that training would have, and remedies")
    parser.add_argument(
        "--megatron-path", type=Path, metavar="DIR", help="Megatron-LM checkout (default: installed Megatron)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_doctor)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Run the checks and print their findings. Return 1 if a finding is a problem, else 0."""
    findings = run_checks(environment_for(arguments.megatron_path))
    if arguments.json:
        print(as_json(findings))
    else:
        print_findings(findings)
    return 1 if any(finding.status == "problem" for finding in findings) else 0


def print_findings(findings: Sequence[Finding]) -> None:
    """Print one row per finding, and the number of problems and notes."""
    from rich.console import Console
    from rich.text import Text

    from megatron_wallfacer.cli.table import new_table, print_table

    console = Console()
    table = new_table(console, "", "check", "result -> remedy")
    arrow = "\n-> " if console.is_terminal else " -> "
    for finding in findings:
        status = Text(finding.status, style=_STYLES[finding.status])
        text = finding.result + (arrow + finding.remedy if finding.remedy else "")
        table.add_row(status, Text(finding.name), Text(text))
    print_table(console, table)
    count = Counter(finding.status for finding in findings)
    console.print(f"{_counted(count['problem'], 'problem')}, {_counted(count['note'], 'note')}", highlight=False)


def _counted(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"
