"""Result of a kernel that was called in a process of its own. This module does not import PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

#: Seconds for one stage of one kernel. A first import from a slow disk, or a first compilation, takes one minute.
DEADLINE_S = 120
#: Channels per head.
HEAD_DIM = 128
#: Allowed relative error of each tensor: root mean square of the error, divided by that of the fp64 reference. Rounding
#: to bf16 causes 3e-3; a wrong mask, scale or layout causes more than 1e-1.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class KernelResult:
    """Result of one kernel.

    Attributes:
        kernel: value of ``--wallfacer-kernel``.
        selected: name of the kernel that this value selects; empty for none.
        unavailable: reason why this node cannot run the kernel; empty for an available kernel.
        failure: stage with its exception or with the end of the process; empty without a failure.
        errors: relative error of out, lse, dq, dk and dv; empty for a kernel that was not called.
        cudnn: folders of the cuDNN libraries in the process.
    """

    kernel: str
    selected: str = ""
    unavailable: str = ""
    failure: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    cudnn: Sequence[str] = ()

    @property
    def is_accurate(self) -> bool:
        """Whether the kernel was called and every tensor is within the tolerance."""
        # A NaN is not within the tolerance.
        return bool(self.errors) and all(error <= TOLERANCE for error in self.errors.values())

    @property
    def is_broken(self) -> bool:
        """Whether the kernel is available and fails or is inaccurate."""
        return not self.unavailable and not self.is_accurate
