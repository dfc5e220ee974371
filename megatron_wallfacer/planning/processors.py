"""Processor time of ranks that run as processes on one node, as on an emulated cluster."""

from __future__ import annotations

from random import Random

from megatron_wallfacer.planning.cluster import HostProcessors
from megatron_wallfacer.planning.fluid import Uses
from megatron_wallfacer.planning.symmetry import Symmetry
from megatron_wallfacer.schedule.ops import Attend, Op, View

#: Name of the processors among the resources of the fluid model.
CORES = "cores"


def overhead_s(host: HostProcessors, op: Op | None) -> float:
    """Return the CPU seconds that do not depend on bytes: of an operation, or of a pass itself if ``op`` is None."""
    match op:
        case None:
            return host.pass_us * 1e-6
        case View():
            return 0.0  # a view does no work
        case Attend():
            return host.attend_us * 1e-6
    return host.operation_us * 1e-6


class WakeUpDelay:
    """Random delays of threads that have slept and wait for a CPU core.

    Half of the measured delays are shorter than a quarter of the mean delay, and a tenth are longer than 2.5 times the
    mean delay, as in a Weibull distribution of shape 1/2. The mean delay is proportional to the fraction of the
    processors that is in use.
    """

    def __init__(self, host: HostProcessors, seed: int = 0) -> None:
        self._mean_s, self._random = host.wake_up_us * 1e-6, Random(seed)

    def seconds(self, used: float, sleeps: int) -> float:
        """Return the seconds that ``sleeps`` wake-ups of a thread take. ``used`` is the used fraction of CPU cores."""
        return self._mean_s * used * sum(self._random.expovariate(1.0) ** 2 / 2 for _ in range(sleeps))


def processor_use(symmetry: Symmetry, rank: int, per_unit: float) -> Uses:
    """Return the CPU cores as a resource of a flow, with the CPU seconds per unit of the flow.

    A flow in the simulation represents one flow on every rank in the symmetry class of ``rank``. The CPU seconds are
    the sum over these ranks. ``per_unit`` is the CPU time of one rank in seconds per unit, for example per byte.
    """
    return ((CORES, per_unit * symmetry.count(rank, 0, symmetry.grid.cp_size)),)
