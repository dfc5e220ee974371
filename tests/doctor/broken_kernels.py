"""Process that calls kernels which are broken in every way, for ``test_kernels``."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_wallfacer.doctor import kernel_process
from megatron_wallfacer.kernels import select
from megatron_wallfacer.kernels.optional import UnavailableError
from megatron_wallfacer.kernels.reference import ReferenceKernel


class Raises(ReferenceKernel):
    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("cuDNN Error:\n CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED")


class Crashes(ReferenceKernel):
    def backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        os.write(2, b"corrupted double-linked list\n")
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError("not reached")


class Hangs(ReferenceKernel):
    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        time.sleep(600)
        raise AssertionError("not reached")


class Wrong(ReferenceKernel):
    """dk without the scale."""

    def backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = super().backward(*arguments)
        return dq, dk / arguments[-1].scale, dv


class NotANumber(ReferenceKernel):
    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(*arguments)
        return out * float("nan"), lse


def absent() -> None:
    raise UnavailableError("it is not installed: get it")


KERNELS = {"te": Raises, "flash2": Crashes, "flash3": Hangs, "flash4": Wrong, "cudnn": NotANumber, "reference": absent}

if __name__ == "__main__":
    select.REGISTRY = tuple(replace(entry, build=KERNELS.get(entry.name, entry.build)) for entry in select.REGISTRY)
    kernel_process.main(sys.argv[1:], deadline_s=5)
