"""The command: asks another process, prints what it says."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_wallfacer.cli.table import as_json
from megatron_wallfacer.doctor.finding import Finding
from megatron_wallfacer.presets.check import environment_for

#: For all checks; a first import of Megatron from a slow disk takes a minute, a kernel that hangs two.
TIMEOUT_S = 1200
_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``doctor``."""
    parser = commands.add_parser(
        "doctor", help="look at this machine: what training would stumble over, and what to do"
    )
    parser.add_argument(
        "--megatron-path", type=Path, metavar="DIR", help="a Megatron-LM checkout (default: the installed)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_doctor)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Look and print; the exit code is 1 where there is a problem.

    Raises:
        WallfacerError: the path is no checkout.
    """
    found = examine(environment_for(arguments.megatron_path))
    if arguments.json:
        print(as_json(found))
    else:
        _show(found)
    return 1 if any(finding.status == "problem" for finding in found) else 0


def examine(environment: dict[str, str]) -> list[Finding]:
    """Everything that a process with this environment finds; that it died is a problem too."""
    # -P: a folder `megatron` where the user happens to stand is not the one that is looked at.
    command = [sys.executable, "-P", "-W", "ignore", "-m", "megatron_wallfacer.doctor.checks"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        found = _findings((error.stdout or b"").decode(errors="replace"))
        return [*found, _died(found, f"did not answer for {TIMEOUT_S} s")]
    found = _findings(done.stdout)
    if done.returncode == 0:
        return found
    last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
    return [*found, _died(found, f"ended with {_ending(done.returncode)}: {last}")]


def _findings(text: str) -> list[Finding]:
    """Of whole lines; the process may have died within one."""
    return [Finding(**json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _died(found: Sequence[Finding], how: str) -> Finding:
    after = f"after '{found[-1].name}'" if found else "at once"
    return Finding(
        "doctor",
        "problem",
        f"the process that looks {how}; {after}",
        "see python -X faulthandler -m megatron_wallfacer.doctor.checks",
    )


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _show(found: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    from megatron_wallfacer.cli.table import new_table, print_table

    console = Console()
    table = new_table(console, "", "what", "found -> what to do")
    arrow = "\n-> " if console.is_terminal else " -> "
    for finding in found:
        status = Text(finding.status, style=_STYLES[finding.status])
        text = finding.found + (arrow + finding.remedy if finding.remedy else "")
        table.add_row(status, Text(finding.name), Text(text))
    print_table(console, table)
    count = Counter(finding.status for finding in found)
    console.print(f"{_counted(count['problem'], 'problem')}, {_counted(count['note'], 'note')}", highlight=False)


def _counted(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"
