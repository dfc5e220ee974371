"""What a rank does first: enter its namespace, and set TCP up as measured to be the most even."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

from benchmarks.cluster.wiring import NIC

_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30

_TCP = {
    # bbr, the default of some kernels, paces and probes: two flows on one link never settle. cubic is rejected inside a
    # namespace.
    "tcp_congestion_control": "reno",
    # A ring hop comes after a kernel's pause: a window that shrank meanwhile would be TCP's doing, not the scheme's.
    "tcp_slow_start_after_idle": "0",
    # The kernel's own queue below the token bucket, else megabytes pile up in front of the next message.
    "tcp_limit_output_bytes": str(256 * 1024),
    "tcp_no_metrics_save": "1",
}


def enter(namespace: str) -> None:
    """Move this process into a namespace. To be called while it has one thread: later ones inherit it."""
    with open(f"/run/netns/{namespace}") as file:
        os.setns(file.fileno(), os.CLONE_NEWNET)
    for name, value in _TCP.items():
        Path(f"/proc/sys/net/ipv4/{name}").write_text(value)
    os.environ["GLOO_SOCKET_IFNAME"] = NIC


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, and leave Ctrl-C to the parent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def sharpen_timers() -> None:
    """Let sleeps end within microseconds; the default slack of 50 us would be added to every kernel."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)


def keep_memory() -> None:
    """Have the allocator keep what is freed, as that of a device does: a buffer that is made anew in every step is not
    fetched page by page each time, which would be processor time that the network lacks."""
    libc = ctypes.CDLL(None)
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        libc.mallopt(option, _KEPT_BYTES)
