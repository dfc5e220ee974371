"""Python, PyTorch, and what it finds to compute and communicate with."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator

from megatron_wallfacer.doctor.finding import Finding
from megatron_wallfacer.errors import WallfacerError

#: As in setup.py.
PYTHON, TORCH = (3, 12), (2, 6)


def python() -> Iterator[Finding]:
    """The interpreter."""
    found = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info[:2] < PYTHON:
        yield Finding("python", "problem", found, f"use Python {_text(PYTHON)} or newer")
    else:
        yield Finding("python", "ok", found)


def torch_version() -> Iterator[Finding]:
    """PyTorch itself."""
    import torch

    found = f"{torch.__version__}, {torch.__path__[0]}"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH:
        yield Finding("torch", "problem", found, f"install torch {_text(TORCH)} or newer")
    else:
        yield Finding("torch", "ok", found)


def cuda() -> Iterator[Finding]:
    """Whether the launcher would train on GPUs, decided as it decides."""
    import torch

    from megatron_wallfacer.megatron.launcher import refuse_a_gpu_that_torch_does_not_see

    if torch.cuda.is_available():
        yield Finding("cuda", "ok", f"{torch.version.cuda}, {torch.cuda.device_count()} devices")
        return
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    try:
        refuse_a_gpu_that_torch_does_not_see()
    except WallfacerError as error:
        remedy = "see nvidia-smi and the driver's version; a torch without CUDA must be replaced by one that has it"
        yield Finding("cuda", "problem", f"{error} ({built})", remedy)
        return
    yield Finding("cuda", "note", f"no GPU, {built}", "nothing: ranks are CPU processes over gloo")


def gpus() -> Iterator[Finding]:
    """Each GPU, computed on once: a build of torch without code for it shows here."""
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        torch.ones(1, device=f"cuda:{index}").add(1).item()
        found = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        )
        yield Finding(f"gpu {index}", "ok", found)


def communication() -> Iterator[Finding]:
    """NCCL where there are GPUs; gloo anyway, which Megatron uses for checkpoints too."""
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
        yield Finding("nccl", "note", "not in this torch", "nothing: CPU ranks use gloo")
    if dist.is_gloo_available():
        yield Finding("gloo", "ok", "in this torch")
    else:
        yield Finding("gloo", "problem", "not in this torch", "install a torch that has gloo")


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
