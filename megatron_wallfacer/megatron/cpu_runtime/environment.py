"""Set environment variables and the number of threads, and disable torch.compile, before Megatron is imported."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from megatron_wallfacer.megatron.replace import replace


def install() -> None:
    """Set environment variables and the number of threads unless the user has set them, and disable torch.compile."""
    # Megatron decorates dozens of functions with torch.compile. Compiling them for a CPU takes longer than a test.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # validate_args (megatron/training/arguments.py) requires 1 for tensor or context parallelism before Blackwell.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    import torch

    # Dynamo lists torch.cuda's functions by identity and rejects duplicates, so its import must precede `torch_cuda`.
    # torch.optim imports dynamo anyway.
    import torch._dynamo

    leave_uncompiled()
    if "OMP_NUM_THREADS" not in os.environ:
        # torchrun sets the variable to 1 for several ranks. With other launchers each rank would use all cores.
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def leave_uncompiled() -> None:
    """Make ``torch.compile`` return its argument, so that Megatron does not import inductor, which takes 1.5 s."""
    replace("torch:compile", _return_unchanged)


def _return_unchanged(model: Callable | None = None, **_: Any) -> Callable:
    """Return the model uncompiled, in place of `torch.compile`; without a model, return this function."""
    return model if model is not None else _return_unchanged
