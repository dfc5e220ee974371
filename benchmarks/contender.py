"""What is compared: anything that attends over shards of a sequence."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megatron_wallfacer.kernels.protocol import Kernel
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.volume import Shape


class Contender(Protocol):
    """A scheme on one rank. The same object exists, unprepared, in the parent process.

    Attributes:
        label: its name in tables and on the command line.
        package: the foreign package that it needs, if any.
        check_dtype: dtype in which it is compared with dense attention.
        note: what a reader of the table has to know.
    """

    label: str
    package: str | None
    check_dtype: str
    note: str

    def prepare(self) -> None:
        """Make process groups. Collective over the world."""
        ...

    def shard(self, whole: Tensor) -> Tensor:
        """This rank's tokens of a bshd tensor over the whole sequence."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
        """Causal attention on local shards, bshd, differentiable. Collective."""
        ...

    def schedules(self, rank: int, shape: Shape) -> tuple[Schedule, Schedule] | None:
        """Forward and backward schedule of a rank, if it has such a thing."""
        ...
