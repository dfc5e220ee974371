"""What the ranks of an emulated cluster pay for being processes of one machine, whatever the size of what they do."""

from __future__ import annotations

from random import Random

from megatron_wallfacer.planning.cluster import Host
from megatron_wallfacer.schedule.ops import Attend, Load, Op


def overhead_s(host: Host, op: Op | None) -> float:
    """Processor seconds of an operation; None is the end of a pass."""
    match op:
        case None:
            return host.pass_us * 1e-6
        case Load():
            return 0.0  # only names a tensor
        case Attend():
            return host.attend_us * 1e-6
    return host.operation_us * 1e-6


class Lateness:
    """How long those who wake up wait for a processor.

    Of measured waits half are below a quarter of their mean, and a tenth above 2.5 times it: a Weibull distribution of
    shape 1/2. Their mean grows as the part of the processors that is used.

    Args:
        host: whose ``late_us`` is the mean where all of its processors are used.
        draw: the same numbers come of the same one.
    """

    def __init__(self, host: Host, draw: int = 0) -> None:
        self._mean_s, self._draws = host.late_us * 1e-6, Random(draw)

    def seconds(self, used: float, sleeps: int) -> float:
        """Of so many sleeps in a row, when such a part of the processors is used."""
        return self._mean_s * used * sum(self._draws.expovariate(1.0) ** 2 / 2 for _ in range(sleeps))
