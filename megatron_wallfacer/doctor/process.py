"""Run the checks in a process of their own, because a library that they import may end the process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence

from megatron_wallfacer.doctor.finding import Finding

#: Maximum seconds of all checks. A first import of Megatron from a slow disk takes 60 s, a kernel that hangs 120 s.
TIMEOUT_S = 1200
_MODULE = "megatron_wallfacer.doctor.checks"


def run_checks(environment: dict[str, str]) -> list[Finding]:
    """Run all checks in a new process with the given environment variables, and return the findings.

    If the process ends early, the list ends with a finding of status ``problem``.
    """
    # -P ignores the current folder, which may contain a folder `megatron` that is not Megatron.
    command = [sys.executable, "-P", "-W", "ignore", "-m", _MODULE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        findings = _findings((error.stdout or b"").decode(errors="replace"))
        return [*findings, _early_end(findings, f"did not finish within {TIMEOUT_S} s")]
    findings = _findings(done.stdout)
    if done.returncode == 0:
        return findings
    last_line = (done.stderr.strip() or "no error text").splitlines()[-1]
    return [*findings, _early_end(findings, f"ended with {_ending(done.returncode)}: {last_line}")]


def _findings(output: str) -> list[Finding]:
    """Parse one finding per line. A last line without a newline, from a process that ended early, is ignored."""
    return [Finding(**json.loads(line)) for line in output.splitlines(keepends=True) if line.endswith("\n")]


def _early_end(findings: Sequence[Finding], ending: str) -> Finding:
    last = f"after the check '{findings[-1].name}'" if findings else "before the first check"
    return Finding(
        "doctor", "problem", f"the process of the checks {ending}; {last}", f"run python -X faulthandler -m {_MODULE}"
    )


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
