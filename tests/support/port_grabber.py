"""Takes TCP ports that are free, in turns: ``python tests/support/port_grabber.py`` beside the tests.

A third of the ports that the kernel gives away is held at any time, so that two of these may run. The oldest is let go
for each new one. What others let go between a probe and a bind is so taken.
"""

from __future__ import annotations

import resource
import socket
import time
from collections import deque
from pathlib import Path

HOST = "127.0.0.1"


def main() -> None:
    """Run until killed."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    held: deque[socket.socket] = deque()
    while True:
        taken = socket.socket()
        taken.bind((HOST, 0))
        taken.listen()
        held.append(taken)
        if len(held) == min((last - first) // 3, most - 64):
            print("grabbing", flush=True)
            break
    while True:
        held.popleft().close()
        held.append(socket.create_server((HOST, 0)))
        # Hundreds of ports a second are enough; without a pause it takes half of a core from the tests.
        time.sleep(0.001)


if __name__ == "__main__":
    main()
