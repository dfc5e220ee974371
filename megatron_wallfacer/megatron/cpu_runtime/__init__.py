"""Megatron's training loop on a machine without CUDA: the same script, the same arguments, gloo ranks on the CPU.

Meant for trying things out, tests and teaching: every rank, group, collective and gradient is real, only the device is
not. Two calls, both made by the launcher; nothing else of this project knows that this room exists:

    install()                       before the user's script imports Megatron
    argv, added = adapt_argv(argv)  what Megatron has to be told

Limits: the redirection of tensors (`tensors`) holds on the thread that called `install`; features that need kernels or
an allocator of CUDA (FP8, CUDA graphs, offloading, Transformer Engine) are errors of `adapt_argv`.
"""

from __future__ import annotations

import gc

from megatron_wallfacer.megatron.cpu_runtime.arguments import adapt_argv

__all__ = ["adapt_argv", "install", "is_installed"]

_installed = False


def install() -> None:
    """Make torch look enough like a machine with one CUDA device a rank for Megatron to train on the CPU.

    Call it with `sys.path` as the user's script will see it: it imports the `megatron` found there. Idempotent.

    Raises:
        WallfacerError: This torch or this Megatron lacks something that has to be replaced.
    """
    global _installed
    if _installed:
        return
    # A million objects are about to be made that live to the end. The collector would look through them again and
    # again, and once more at exit: a third of the time that a rank needs to start, and most of what it needs to stop.
    gc.disable()
    try:
        _replace_all()
        gc.freeze()
    finally:
        gc.enable()
    _installed = True


def is_installed() -> bool:
    """Whether `install` was called in this process: what `torch.cuda` says is then no longer the machine's answer."""
    return _installed


def _replace_all() -> None:
    """Import torch's and Megatron's modules and replace what has to be replaced.

    The order matters: variables are read when torch's parts are imported, and Megatron binds names of torch.cuda and
    of libraries that it finds.
    """
    from megatron_wallfacer.megatron.cpu_runtime import environment, libraries

    libraries.install()
    environment.install()
    from megatron_wallfacer.megatron import any_device
    from megatron_wallfacer.megatron.cpu_runtime import (
        moe,
        noise,
        rng,
        startup,
        tensors,
        torch_cuda,
    )

    torch_cuda.install()
    rng.install()
    tensors.install()
    noise.install()
    startup.install()
    moe.install()
    any_device.install()
