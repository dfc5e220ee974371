"""``ip`` and ``tc``, and whether they can make namespaces here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from megatron_wallfacer.errors import WallfacerError

_PROBE = (
    "link add probe0 type veth peer name probe1",
    "link add probe2 type bridge",
)


class ClusterUnavailable(WallfacerError):
    """Network namespaces cannot be made here; the message says why, in one line."""


def batch(tool: str, lines: Sequence[str], *, namespace: str | None = None) -> None:
    """Run many commands of ``ip`` or ``tc`` in one process.

    Raises:
        ClusterUnavailable: one failed; with what the tool said.
    """
    if not lines:
        return
    where = [] if namespace is None else ["-n", namespace]
    done = subprocess.run(
        [tool, *where, "-batch", "-"], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ClusterUnavailable(f"{tool} failed: {_one_line(done.stderr)}")


def require_namespaces(prefix: str) -> None:
    """Return if namespaces with limited links can be made.

    It tries, because root in a container often may not, and says nothing about the kernel's modules either.

    Args:
        prefix: begins the name of the namespace that is made for the trial.

    Raises:
        ClusterUnavailable: they cannot.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ClusterUnavailable(f"no {' and no '.join(missing)} here: apt-get install -y iproute2")
    if os.geteuid() != 0:
        raise ClusterUnavailable(f"network namespaces need root with CAP_NET_ADMIN; this is uid {os.geteuid()}")
    probe = f"{prefix}probe"
    try:
        batch("ip", [f"netns add {probe}"])
        batch("ip", _PROBE, namespace=probe)
        batch("tc", ["qdisc add dev probe0 root tbf rate 1mbit burst 10000 limit 10000"], namespace=probe)
    except ClusterUnavailable as error:
        raise ClusterUnavailable(f"network namespaces with limited links cannot be made here ({error})") from None
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()) or "no message"
