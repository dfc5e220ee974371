"""Versions of everything that a figure depends on: ``python -m benchmarks.gpu.machine``, one per line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys

import torch

from megatron_wallfacer.engine.loaded_nccl import loaded_nccl

PACKAGES = (
    "megatron-core transformer-engine flash-attn flash-attn-3 flash-attn-4 ring-flash-attn triton nvidia-cudnn-cu13"
).split()
VARIABLES = ("CUDA_DEVICE_MAX_CONNECTIONS", "CUDNN_HOME", "LD_PRELOAD", "NVTE_FUSED_ATTN", "NVTE_FLASH_ATTN")


def nccl() -> str:
    """Return the version of the NCCL that is loaded, which may be another one than PyTorch was built with."""
    return ".".join(map(str, loaded_nccl() or ("none",)))


def driver() -> str:
    """Return name, driver and memory of each GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return "; ".join(done.stdout.splitlines())


def main() -> int:
    """Print the versions."""
    print(f"GPU: {driver()}")
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPU cores")
    print(f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl()}")
    if torch.cuda.is_available():
        print(f"cuDNN {torch.backends.cudnn.version()}")
    for name in PACKAGES:
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name}: not installed")
    for name in VARIABLES:
        print(f"{name}={os.environ.get(name, '(unset)')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
