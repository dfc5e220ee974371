"""Environment variables, thread count and the compiler: what has to be settled before Megatron is imported."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from megatron_wallfacer.megatron.replace import replace


def install() -> None:
    """Set what is not set; a value that the user chose stays."""
    # Megatron decorates dozens of functions with torch.compile. Compiling them for a CPU takes longer than a test runs.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # validate_args (megatron/training/arguments.py) asserts "1" for tensor or context parallelism before Blackwell.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    import torch

    # Importing dynamo costs half a second and cannot be avoided (torch.optim does it). It lists torch.cuda's functions
    # by identity and rejects duplicates, so it has to see them before `torch_cuda` replaces them.
    import torch._dynamo

    leave_uncompiled()
    if "OMP_NUM_THREADS" not in os.environ:
        # torchrun sets it to 1 for several ranks. Other launchers leave torch one thread a core in every rank.
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def leave_uncompiled() -> None:
    """Make ``torch.compile`` return its argument. Otherwise the import of Megatron imports inductor: 1.5 s."""
    replace("torch.compile", _return_unchanged)


def _return_unchanged(model: Callable | None = None, **_: Any) -> Callable:
    """`torch.compile`, as a function, a decorator, and a decorator with arguments."""
    return model if model is not None else _return_unchanged
