"""Bytes that went over the links of a rank, as its own namespace counts them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.cluster.wiring import NIC, NODE_LINK


@dataclass(frozen=True)
class LinkBytes:
    """Bytes over a rank's two links, headers and acknowledgements included."""

    inter_sent: int = 0
    inter_received: int = 0
    intra_sent: int = 0
    intra_received: int = 0

    @property
    def sent(self) -> int:
        """Over both links."""
        return self.inter_sent + self.intra_sent

    def __sub__(self, before: LinkBytes) -> LinkBytes:
        return LinkBytes(
            self.inter_sent - before.inter_sent,
            self.inter_received - before.inter_received,
            self.intra_sent - before.intra_sent,
            self.intra_received - before.intra_received,
        )


def read_counters() -> LinkBytes:
    """Counters of the namespace that the calling thread is in."""
    # Not /sys: that is the one that was mounted, of the machine's own namespace.
    table = parse_net_dev(Path("/proc/thread-self/net/dev").read_text())
    inter, intra = table.get(NIC, (0, 0)), table.get(NODE_LINK, (0, 0))
    return LinkBytes(inter[1], inter[0], intra[1], intra[0])


def parse_net_dev(text: str) -> dict[str, tuple[int, int]]:
    """(received, sent) bytes by interface."""
    rows = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): (int(numbers.split()[0]), int(numbers.split()[8])) for name, numbers in rows}
