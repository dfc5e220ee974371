"""Run Megatron's training loop on a node without CUDA: the same script and arguments, with gloo ranks on the CPU.

The CPU runtime is for tests, teaching and small experiments. Ranks, groups, collectives and gradients are real; only
the device differs. The launcher calls ``install()`` before the user's script imports Megatron. The launcher calls
``adapt_argv(argv)`` to add arguments for training on a CPU.

Limits: only the thread that called `install` can train. `adapt_argv` raises an error for features that need
CUDA kernels or CUDA's allocator (FP8, CUDA graphs, offloading, TransformerEngine).
"""

from __future__ import annotations

import gc

from megatron_wallfacer.megatron.cpu_runtime.arguments import adapt_argv

__all__ = ["adapt_argv", "install", "is_installed"]

_installed = False


def install() -> None:
    """Make torch report one CUDA device per rank, and run its work on the CPU. A second call has no effect.

    This function imports `megatron`, so `sys.path` must already be the module search path of the user's script.

    Raises:
        WallfacerError: Torch or Megatron does not have a name that must be replaced.
    """
    global _installed
    if _installed:
        return
    # The imports make a million objects that live until exit. Garbage collection of these objects would take a third of
    # a rank's start time and most of its exit time.
    gc.disable()
    try:
        # Environment variables are set before the import of torch. Names of torch.cuda are replaced
        # before the import of Megatron, which binds the names.
        from megatron_wallfacer.megatron.cpu_runtime import environment, libraries

        libraries.install()
        environment.install()
        from megatron_wallfacer.megatron import any_device
        from megatron_wallfacer.megatron.cpu_runtime import megatron_functions, noise, tensors, torch_cuda

        for part in (torch_cuda, tensors, noise, megatron_functions, any_device):
            part.install()
        gc.freeze()
    finally:
        gc.enable()
    _installed = True


def is_installed() -> bool:
    """Return whether `install` was called in this process. `install` makes `torch.cuda` report a device on any node."""
    return _installed
