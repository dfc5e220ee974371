"""The result of testing a kernel in a separate process. This module does not import PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

#: Maximum seconds of one stage of one kernel. A first import from a slow disk or a first compilation takes 60 s.
DEADLINE_S = 120
#: Channels per head.
HEAD_DIM = 128
#: Allowed relative error of each tensor: root mean square of the error, divided by the root mean square of the fp64
#: reference. Rounding to bf16 causes 3e-3. A wrong mask, scale or layout causes more than 1e-1.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class KernelResult:
    """Result of one kernel.

    Attributes:
        kernel: value of ``--wallfacer-kernel``.
        selected: name of the kernel that ``--wallfacer-kernel`` selects; empty if no kernel is selected.
        unavailable: reason why this node cannot run the kernel, or empty if the node can.
        failure: stage that failed, and its exception or the exit status of the process; empty if no stage failed.
        errors: relative errors of out, lse, dq, dk and dv, or empty if the kernel was not called.
        cudnn: folders of the cuDNN libraries that the process has loaded.
    """

    kernel: str
    selected: str = ""
    unavailable: str = ""
    failure: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    cudnn: Sequence[str] = ()

    @property
    def is_accurate(self) -> bool:
        """Whether the kernel has run, with relative errors within the tolerance for all tensors."""
        # The comparison is False for NaN.
        return bool(self.errors) and all(error <= TOLERANCE for error in self.errors.values())

    @property
    def is_broken(self) -> bool:
        """Whether the kernel is available but fails or is inaccurate."""
        return not self.unavailable and not self.is_accurate
