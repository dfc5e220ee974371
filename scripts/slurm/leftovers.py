"""Names what an earlier job left on this node: its ranks, the processes that they forked, and a port in use.

    python leftovers.py HOST:PORT

Prints one line for each; ends with 0 in any case and kills nothing. A rank is a process of this user whose environment
has ``RANK`` and ``MASTER_ADDR`` and another ``SLURM_JOB_ID`` than this one. Checkpoint writers are forked by ranks.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator

import psutil

JOB = "SLURM_JOB_ID"


def left_processes() -> Iterator[str]:
    """Yield a line for each process of another job's rank."""
    mine = os.environ.get(JOB)
    for process in psutil.process_iter(["pid", "uids", "environ", "cmdline"]):
        found = process.info
        variables = found["environ"] or {}
        if not {"RANK", "MASTER_ADDR"} <= variables.keys() or found["uids"].real != os.getuid():
            continue
        if mine is None or variables.get(JOB) != mine:
            job = variables.get(JOB, "none")
            command = " ".join(found["cmdline"] or ())[:80]
            yield f"left over: process {found['pid']}, rank {variables['RANK']} of job {job}: {command}"


def used_port(endpoint: str) -> Iterator[str]:
    """Yield a line if the port is in use on this node, which may be another node than the endpoint's."""
    port = int(endpoint.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                yield f"left over: port {port} is in use"


def main() -> None:
    """Print all lines."""
    for line in (*left_processes(), *used_port(sys.argv[1])):
        print(line)


if __name__ == "__main__":
    main()
