"""The machine, which workers of pytest-xdist share, and other runs of pytest: who needs it alone has it alone."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def shared(*, alone: bool) -> Iterator[None]:
    """While a test runs. One that wants to be alone waits for the others to end, and nobody begins meanwhile."""
    with _file("door") as door, _file("room") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield


#: Seconds of :func:`_fixed_work` on the machine on which the tests' time limits were set, idle: 2 cores, Python 3.12.1.
REFERENCE_S = 0.15


def time_limit(seconds: float, clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Return a function that returns the limit here, to be called when the work is done.

    The limit is multiplied by the time of a fixed piece of work, before or after, relative to the machine on which
    limits were set: the same work takes twice as long where a neighbour shares the core. It is never made shorter.

    Args:
        seconds: limit on that machine.
        clock: returns seconds; ``time.process_time`` for limits of processor time.
    """
    before = _slowness(clock)
    return lambda: seconds * max(before, _slowness(clock))


def _slowness(clock: Callable[[], float]) -> float:
    begin = clock()
    _fixed_work()
    return max(1.0, (clock() - begin) / REFERENCE_S)


def _fixed_work() -> int:
    """Calls, objects and dictionaries, as pure Python code has them."""
    seen: dict[tuple[int, int], int] = {}
    for number in range(200_000):
        key = number % 251, number % 241
        seen[key] = max(seen.get(key, 0), number)
    return len(sorted(seen.items()))


def install(packages: Sequence[str]) -> str | None:
    """Install packages of Debian's, one worker at a time.

    Returns:
        The reason why it did not work, if it did not.
    """
    with _file("packages") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        with _no_services():
            return _apt_get(packages)


def _apt_get(packages: Sequence[str]) -> str | None:
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        try:
            done = subprocess.run(
                ["apt-get", "--quiet", *words],
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True,
                text=True,
                timeout=900,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"apt-get could not install {' '.join(packages)}: {error}"
    return None if done.returncode == 0 else f"apt-get could not install {' '.join(packages)}: {done.stderr[-300:]}"


@contextmanager
def _no_services() -> Iterator[None]:
    """Debian starts a service when it installs it, unless this says no: none is configured yet."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            policy.unlink()


def _file(name: str) -> IO[str]:
    """To be locked. Closing it gives the lock back, and so does the death of the worker."""
    return (Path(tempfile.gettempdir()) / f"wallfacer-tests-{os.getuid()}-{name}").open("w")
