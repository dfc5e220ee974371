"""Check environment variables that affect training."""

from __future__ import annotations

import os
from collections.abc import Iterator

from megatron_wallfacer.doctor.finding import Finding
from megatron_wallfacer.megatron.version import ALLOW_UNTESTED
from megatron_wallfacer.presets.torchrun import OWN_STORE

CONNECTIONS, THREADS = "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"
_BLACKWELL = 10  # lowest major compute capability for which Megatron does not check the variable
_PREFIXES = ("NCCL_", "TORCH_NCCL_", "TORCH_FR_", "GLOO_", "TORCH_GLOO_", "TORCH_DISTRIBUTED_", "NVTE_", "WALLFACER_")
_OTHERS = ("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF")
#: Values that slow down training and often remain set after debugging.
_SLOW = {
    "CUDA_LAUNCH_BLOCKING=1": "unset it: communication and computation cannot overlap",
    "NCCL_P2P_DISABLE=1": "unset it unless NVLink or PCIe peer access is broken: data go through host memory",
    "NCCL_SHM_DISABLE=1": "unset it unless shared memory is broken: data go through the network",
    "NCCL_IB_DISABLE=1": "unset it on a node with InfiniBand: NCCL uses sockets instead",
    f"{ALLOW_UNTESTED}=1": "unset it: this Megatron release is not tested",
}


def connections() -> Iterator[Finding]:
    """Check CUDA_DEVICE_MAX_CONNECTIONS: tensor and context parallelism need 1 on GPUs older than Blackwell."""
    import torch

    value = os.environ.get(CONNECTIONS)
    text = f"{CONNECTIONS}={value}" if value is not None else f"{CONNECTIONS} is not set"
    remedy = f"export {CONNECTIONS}=1, or a preset that extends configs/env/gpu.yaml"
    on_gpu = torch.cuda.is_available()
    needed = torch.cuda.get_device_capability(0)[0] < _BLACKWELL if on_gpu else value is not None
    if needed and value != "1":
        yield Finding("connections", "problem", f"{text}; Megatron stops with context parallelism", remedy)
    elif value is None and not on_gpu:
        yield Finding("connections", "ok", f"{text}; the launcher sets 1 for CPU ranks")
    else:
        yield Finding("connections", "ok", text)


def threads() -> Iterator[Finding]:
    """Check the threads per rank. Several CPU ranks with more than one thread each are slow."""
    import torch

    value = os.environ.get(THREADS)
    if value is None:
        yield Finding("threads", "ok", f"{THREADS} is not set; torchrun sets 1 for several ranks")
    elif value != "1" and not torch.cuda.is_available():
        remedy = f"export {THREADS}=1 for several ranks on a node"
        yield Finding("threads", "note", f"{THREADS}={value} in each CPU rank", remedy)
    else:
        yield Finding("threads", "ok", f"{THREADS}={value}")


def restarts() -> Iterator[Finding]:
    """Check the environment variable that gives each attempt of ``torchrun --max-restarts`` a store of its own."""
    text = f"{OWN_STORE} is not 1; only torchrun --max-restarts over gloo needs it, and presets set it"
    if os.environ.get(OWN_STORE) == "1":
        text = f"{OWN_STORE}=1; torchrun --max-restarts works over gloo"
    yield Finding("restarts", "ok", text)


def others() -> Iterator[Finding]:
    """Report the environment variables of PyTorch, NCCL, gloo, TransformerEngine and the plugin that are set."""
    for name, value in sorted(os.environ.items()):
        if name.startswith(_PREFIXES) or name in _OTHERS:
            text = f"{name}={value}"
            remedy = _SLOW.get(text, "")
            yield Finding("variable", "note" if remedy else "ok", text, remedy)
