"""Network namespaces: for programs that take the numbers of ports from a file, or probe them as torchrun does.

In a namespace of its own no other process can take a port that a program has been given and has not bound yet.
"""

from __future__ import annotations

import functools
import shutil
import socket
import subprocess

#: Loopback is up there, and has the address of this host's name, to which torchrun's ranks connect, and one that is not
#: of loopback: without any, getaddrinfo (AI_ADDRCONFIG), which Slurm calls, finds no address to listen on.
_SCRIPT = """
set -e
ip link set lo up
for address in {addresses}; do ip address add $address/32 dev lo; done
exec "$@"
"""
_ADDRESS = "192.0.2.1"  # for documentation: RFC 5737


@functools.cache
def why_no_namespace() -> str | None:
    """The reason why there can be no namespace here, if there is one."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            return f"needs {tool}, for a network namespace"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0:
        return "needs a network namespace: unshare --net is not permitted"
    return None


def in_namespace(*command: str) -> list[str]:
    """Return a command that runs another one, with its process id, in a new namespace that ends with it."""
    addresses = {address[4][0] for address in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    outside = sorted({_ADDRESS, *(address for address in addresses if not address.startswith("127."))})
    return ["unshare", "--net", "sh", "-c", _SCRIPT.format(addresses=" ".join(outside)), "sh", *command]
