"""Check Python, PyTorch, its GPUs and its communication backends."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator

from megatron_wallfacer.doctor.finding import Finding
from megatron_wallfacer.errors import WallfacerError

#: Oldest supported releases. setup.py has the same values.
PYTHON, TORCH = (3, 12), (2, 6)


def python() -> Iterator[Finding]:
    """Check the version of Python."""
    text = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info[:2] < PYTHON:
        yield Finding("python", "problem", text, f"use Python {_text(PYTHON)} or newer")
    else:
        yield Finding("python", "ok", text)


def torch_version() -> Iterator[Finding]:
    """Check the version of PyTorch."""
    import torch

    text = f"{torch.__version__}, {torch.__path__[0]}"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH:
        yield Finding("torch", "problem", text, f"install torch {_text(TORCH)} or newer")
    else:
        yield Finding("torch", "ok", text)


def cuda() -> Iterator[Finding]:
    """Check whether the launcher would start ranks on GPUs or on the CPU."""
    import torch

    from megatron_wallfacer.megatron.launcher import check_that_torch_sees_gpus

    if torch.cuda.is_available():
        yield Finding("cuda", "ok", f"{torch.version.cuda}, {torch.cuda.device_count()} devices")
        return
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    try:
        check_that_torch_sees_gpus()
    except WallfacerError as error:
        remedy = "check nvidia-smi and the version of the driver; install a torch that is built with CUDA"
        yield Finding("cuda", "problem", f"{error} ({built})", remedy)
        return
    yield Finding("cuda", "note", f"no GPU, {built}", "none needed: ranks are CPU processes over gloo")


def gpus() -> Iterator[Finding]:
    """Run one operation on each GPU. The operation fails if PyTorch is built without code for the GPU."""
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        torch.ones(1, device=f"cuda:{index}").add(1).item()
        text = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        )
        yield Finding(f"gpu {index}", "ok", text)


def communication() -> Iterator[Finding]:
    """Check NCCL, which GPUs need, and gloo, which CPUs need. Megatron also uses gloo for checkpoints."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding("torch.distributed", "problem", "not in this torch", "install a torch that has it")
        return
    if dist.is_nccl_available():
        yield Finding("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    elif torch.cuda.is_available():
        yield Finding("nccl", "problem", "not in this torch", "install a torch that has NCCL")
    else:
        yield Finding("nccl", "note", "not in this torch", "none needed: CPU ranks use gloo")
    if dist.is_gloo_available():
        yield Finding("gloo", "ok", "in this torch")
    else:
        yield Finding("gloo", "problem", "not in this torch", "install a torch that has gloo")


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
