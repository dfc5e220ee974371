"""Environment variables that change how training runs."""

from __future__ import annotations

import os
from collections.abc import Iterator

from megatron_wallfacer.doctor.finding import Finding
from megatron_wallfacer.megatron.version import ALLOW_UNTESTED
from megatron_wallfacer.presets.torchrun import OWN_STORE

CONNECTIONS, THREADS = "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"
_BLACKWELL = 10  # compute capability from which Megatron asks for no number of connections
_SHOWN = ("NCCL_", "TORCH_NCCL_", "TORCH_FR_", "GLOO_", "TORCH_GLOO_", "TORCH_DISTRIBUTED_", "NVTE_", "WALLFACER_")
_SHOWN_TOO = ("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF")
#: Settings that are left over from a search for a mistake more often than meant.
_SLOW = {
    "CUDA_LAUNCH_BLOCKING=1": "unset it: nothing overlaps with it",
    "NCCL_P2P_DISABLE=1": "unset it unless NVLink or PCIe peer access is broken: GPUs of a machine talk through memory",
    "NCCL_SHM_DISABLE=1": "unset it unless shared memory is broken: GPUs of a machine talk through the network",
    "NCCL_IB_DISABLE=1": "unset it where there is InfiniBand: NCCL takes sockets instead",
    f"{ALLOW_UNTESTED}=1": "unset it: hooks are tried on a Megatron that nobody has tested",
}


def connections() -> Iterator[Finding]:
    """Megatron stops before Blackwell, with tensor or context parallelism, where this is not 1."""
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
    """More than one thread in each of several CPU ranks wait for each other."""
    import torch

    value = os.environ.get(THREADS)
    if value is None:
        yield Finding("threads", "ok", f"{THREADS} is not set; torchrun sets 1 for several ranks")
    elif value != "1" and not torch.cuda.is_available():
        remedy = f"export {THREADS}=1 for several ranks on a machine"
        yield Finding("threads", "note", f"{THREADS}={value} in each CPU rank", remedy)
    else:
        yield Finding("threads", "ok", f"{THREADS}={value}")


def restarts() -> Iterator[Finding]:
    """Over gloo a restarted job cannot join the store of torchrun's agent, which has the keys of the attempt before."""
    value = os.environ.get(OWN_STORE)
    if value == "1":
        yield Finding("restarts", "ok", f"{OWN_STORE}=1; torchrun --max-restarts works over gloo")
    else:
        text = f"{OWN_STORE} is not 1; only torchrun --max-restarts over gloo needs it, and presets set it"
        yield Finding("restarts", "ok", text)


def others() -> Iterator[Finding]:
    """Everything else that is set and that PyTorch, NCCL, TransformerEngine or the plugin read."""
    for name, value in sorted(os.environ.items()):
        if name.startswith(_SHOWN) or name in _SHOWN_TOO:
            text = f"{name}={value}"
            remedy = _SLOW.get(text, "")
            yield Finding("variable", "note" if remedy else "ok", text, remedy)
