"""The cluster's life: made on entry, gone on exit, and what a killed run left behind goes first."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from benchmarks.cluster.tools import batch, require_namespaces
from benchmarks.cluster.topology import Topology
from benchmarks.cluster.wiring import Wiring

PREFIX = "wfbench"
_NETNS = Path("/run/netns")
_NAME = re.compile(rf"{PREFIX}-(\d+)-\w+")


class Cluster:
    """Namespaces, bridges and links of a topology, as a context manager.

    Names carry the pid of the process that made them, so that two runs cannot meet, and a later run can tell a live
    cluster from one whose owner was killed with -9.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.wiring = Wiring(topology, f"{PREFIX}-{os.getpid()}-")

    def __enter__(self) -> Cluster:
        remove_leftovers()
        require_namespaces(self.wiring.prefix)
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._remove()

    def _build(self) -> None:
        wiring = self.wiring
        batch("ip", [f"netns add {name}" for name in wiring.namespaces])
        batch("ip", wiring.switch_links(), namespace=wiring.switch)
        batch("tc", wiring.switch_limits(), namespace=wiring.switch)
        for rank in range(self.topology.ranks):
            batch("ip", wiring.rank_links(rank), namespace=wiring.namespace(rank))
            batch("tc", wiring.rank_limits(), namespace=wiring.namespace(rank))

    def _remove(self) -> None:
        # A second Ctrl-C must not stop the cleaning after the first.
        held = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            _delete([name for name in existing() if name.startswith(self.wiring.prefix)])
        finally:
            for number, handler in held.items():
                signal.signal(number, handler)


def existing() -> list[str]:
    """Namespaces of emulated clusters, whoever made them."""
    return sorted(path.name for path in _NETNS.glob(f"{PREFIX}-*")) if _NETNS.is_dir() else []


def leftovers() -> list[str]:
    """Those whose maker is gone."""
    return [name for name in existing() if (found := _NAME.fullmatch(name)) and not _is_alive(int(found[1]))]


def remove_leftovers() -> None:
    """Remove what runs left behind that could not clean up: namespaces, and the logs of their ranks."""
    _delete(leftovers())
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}-*"):
        if (found := _NAME.fullmatch(folder.name)) and not _is_alive(int(found[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _delete(names: list[str]) -> None:
    for name in names:
        # A namespace lives on, nameless, while a process is in it.
        for pid in processes_in(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 2.0
    while any(processes_in(name) for name in names) and time.monotonic() < deadline:
        time.sleep(0.02)
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def processes_in(namespace: str) -> list[int]:
    """Processes in a namespace, this one never among them."""
    with suppress(OSError):
        inode = (_NETNS / namespace).stat().st_ino
        return [pid for pid in _pids() if pid != os.getpid() and network_of(pid) == inode]
    return []


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def network_of(pid: int) -> int | None:
    """Identity of the network namespace that a process is in; None if it has ended."""
    with suppress(OSError):
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    return None


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
