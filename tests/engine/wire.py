"""Bytes that really cross the wire, beside the bytes that are counted.

Run as ``python -m tests.engine.wire``: it enters a network namespace of its own, whose loopback device nobody else
uses, starts a pool of gloo ranks there, and prints as JSON, for each case, the bytes that the ranks counted and
the bytes that the device carried.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

NOT_ALLOWED = 77  # the exit status of a test that does not apply
IN_NAMESPACE = {"GLOO_SOCKET_IFNAME": "lo"}


Measured = dict[str, dict[str, Any]]


def measure() -> Measured | str:
    """What :func:`main` prints, or why a namespace is not to be had."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(
        command, cwd=root, env=os.environ | IN_NAMESPACE, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode == NOT_ALLOWED:
        return done.stderr.strip()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main() -> None:
    try:
        _enter_namespace()
    except (OSError, AttributeError) as error:  # not allowed, or not on Linux
        sys.stderr.write(f"no network namespace: {error}")
        sys.exit(NOT_ALLOWED)
    # Later than the namespace: one that is made without being root asks for a process of one thread.
    from tests.engine import traffic
    from tests.support.pool import Pool

    pool, found = Pool(traffic.RANKS), {}
    for name, jobs in traffic.cases().items():
        for job, args in jobs.values():
            pool.run(job, *args)  # connections are made by the first call
        for part, (job, args) in jobs.items():
            before = _carried()
            counted = sum(pool.run(job, *args), Counter())
            found[f"{name} {part}".strip()] = {"counted": counted, "carried": _carried() - before}
    pool.close()
    sys.stdout.write(json.dumps(found))


def _enter_namespace() -> None:
    try:
        os.unshare(os.CLONE_NEWNET)
    except PermissionError:  # Not root: a user namespace gives the right to it, where those are allowed.
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)
    set_flags, up_and_running = 0x8914, 0x1 | 0x40  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh", b"lo", up_and_running))


def _carried() -> int:
    """Bytes received so far by the loopback device of this namespace."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


if __name__ == "__main__":
    main()
