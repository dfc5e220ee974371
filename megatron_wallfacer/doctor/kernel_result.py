"""How a kernel fared in the process that called it, and what it was held against. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

#: For one stage of one kernel. A first import from a slow disk, or a compilation at the first call, takes a minute.
DEADLINE_S = 120
#: Channels of a head of today's models.
HEAD_DIM = 128
#: Root mean square of the error over that of the reference in fp64, for each tensor. Rounding to bf16 makes 3e-3 of it;
#: a wrong mask, scale or layout more than 1e-1.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Answer:
    """What is known of one kernel.

    Attributes:
        kernel: its name.
        chosen: name of the kernel that is taken for it; empty where none is.
        absent: why there is none here; empty where there is one.
        failed: what it raised, or how the process ended, and in which stage; empty where it did neither.
        errors: relative error of out, lse, dq, dk and dv; empty where it was not called.
        cudnn: folders of the cuDNN libraries that the process had.
    """

    kernel: str
    chosen: str = ""
    absent: str = ""
    failed: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    cudnn: Sequence[str] = ()

    @property
    def right(self) -> bool:
        """It was called, and every tensor is within the tolerance."""
        # Written so that a nan is wrong.
        return bool(self.errors) and all(error <= TOLERANCE for error in self.errors.values())

    @property
    def broken(self) -> bool:
        """It is here, and does not do what it is for."""
        return not self.absent and not self.right
