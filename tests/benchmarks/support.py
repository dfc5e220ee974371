"""Running the harness as a person does, and where that is possible."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="settings are YAML: PyYAML, of the dev extra, is not installed")

from benchmarks.cluster.cluster import PREFIX
from benchmarks.cluster.tools import ClusterUnavailable, require_namespaces

REPOSITORY = Path(__file__).resolve().parents[2]
SMOKE = REPOSITORY / "benchmarks" / "configs" / "smoke-2x2.yaml"


@cache
def why_not() -> str | None:
    """Why no cluster can be made here; None if it can."""
    try:
        require_namespaces(f"{PREFIX}-{os.getpid()}-")
    except ClusterUnavailable as error:
        return str(error)
    return None


needs_cluster = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """``python -m benchmarks.emulated`` with these arguments."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.emulated", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests are a shell's background job, SIGINT is ignored, and that would be inherited.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    """Read what it says until a line has these words."""
    said = []
    for line in process.stderr:
        said.append(line)
        if words in line:
            return
    raise AssertionError(f"ended without saying {words!r}:\n{''.join(said)}")
