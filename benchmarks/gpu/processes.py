"""A command with a time limit: all that it started ends with it, also processes in sessions of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

#: Marks every process of one command: torchrun puts its ranks into sessions of their own.
MARK = "WALLFACER_ACCEPTANCE_COMMAND"
GRACE_S = 3.0


def run(command: Sequence[str], variables: Mapping[str, str | None], log: Path, limit_s: float) -> int | None:
    """Run a command, its output in a log as it comes.

    Args:
        command: program and arguments.
        variables: environment variables; None unsets one.
        log: file for stdout and stderr.
        limit_s: seconds after which every process of the command is killed.

    Returns:
        The exit code; None if it was killed at its limit.
    """
    mark = uuid.uuid4().hex
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=environment | {MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(mark)
            process.wait()


def end(mark: str) -> None:
    """End all processes with a mark: SIGTERM, and SIGKILL for those that stay."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        for pid in _marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while list(_marked(mark)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)


def _marked(mark: str) -> Iterator[int]:
    """Process ids; a process that has ended and waits for its parent has no environment left."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)
