"""Whether somebody else uses the processor. Other load does not shift such measurements, it wrecks them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_wallfacer.errors import WallfacerError

#: Share of the whole machine that may be busy for it to count as idle.
IDLE = 0.06
_LOOK_S = 1.0
#: Busy time over our own that is still taken for our own, and the seconds that rounding to ticks may add.
TOLERANCE, ROUNDING_S = 0.12, 0.05


class MachineBusy(WallfacerError):
    """Others keep the machine busy."""


@dataclass(frozen=True)
class CpuTime:
    """Seconds since boot, all cores together.

    Attributes:
        processes: in user and system mode, everybody's.
        interrupts: in hard and soft interrupts; packets of a virtual link are handled there, for whoever sent them.
        stolen: taken by the host of a virtual machine.
    """

    processes: float
    interrupts: float
    stolen: float

    def __sub__(self, before: CpuTime) -> CpuTime:
        return CpuTime(
            self.processes - before.processes, self.interrupts - before.interrupts, self.stolen - before.stolen
        )

    def disturbed(self, own_s: float) -> bool:
        """Whether others took more than the tolerated share, given the seconds of our own processes."""
        return self.processes + self.stolen > own_s * (1 + TOLERANCE) + ROUNDING_S


def cpu_time() -> CpuTime:
    """Now."""
    return parse_stat(Path("/proc/stat").read_text(), os.sysconf("SC_CLK_TCK"))


def parse_stat(text: str, ticks_per_s: int) -> CpuTime:
    """From the first line of /proc/stat."""
    user, nice, system, _, _, irq, softirq, stolen = (int(x) / ticks_per_s for x in text.splitlines()[0].split()[1:9])
    return CpuTime(user + nice + system, irq + softirq, stolen)


def process_s(pids: Iterable[int]) -> float:
    """Processor seconds, user and system, that these processes have used; those that are gone count as none."""
    ticks = 0
    for pid in pids:
        with suppress(OSError):
            # After the name, which may have spaces and parentheses.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def wait_until_idle(limit_s: float, own: Sequence[int]) -> None:
    """Return when nobody but the processes ``own`` has used the machine for a second.

    Raises:
        MachineBusy: it was not, within ``limit_s``.
    """
    deadline, cores = time.monotonic() + limit_s, os.cpu_count() or 1
    while True:
        before, ours = cpu_time(), process_s(own)
        time.sleep(_LOOK_S)
        passed = cpu_time() - before
        others = passed.processes + passed.stolen - (process_s(own) - ours)
        busy = others / (_LOOK_S * cores)
        if busy <= IDLE:
            return
        if time.monotonic() > deadline:
            raise MachineBusy(
                f"{busy:.0%} of the processor is in use by others after {limit_s:g} s of waiting; "
                "stop them, wait longer (--idle-wait), or mark the result as disturbed (--allow-busy)"
            )
