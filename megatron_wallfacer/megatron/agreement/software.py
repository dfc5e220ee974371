"""Digests of the code that a rank runs, and versions of libraries, which all ranks compare."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
from importlib import metadata

import torch

import megatron_wallfacer
from megatron_wallfacer.engine.loaded_nccl import loaded_nccl

#: Distributions that attention or Megatron's layers use.
LIBRARIES = (
    "transformer-engine",
    "transformer-engine-torch",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-frontend",
    "apex",
    "triton",
)


def code() -> dict[str, str | None]:
    """Return the software that must be equal on all ranks: digests of code, torch's commit, NCCL and libraries."""
    nccl = loaded_nccl() if torch.cuda.is_available() and torch.version.cuda else None
    return {
        "megatron-wallfacer of SHA-256": digest("megatron_wallfacer"),
        "megatron.core of SHA-256": digest("megatron.core"),
        "torch of commit": torch.version.git_version,
        "NCCL": None if nccl is None else ".".join(map(str, nccl)),
        **{name: version(name) for name in LIBRARIES},
    }


def labels(megatron_version: str) -> dict[str, str | None]:
    """Return package versions. The versions may differ between ranks, but the results of :func:`code` must be equal."""
    return {
        "megatron-wallfacer": megatron_wallfacer.__version__,
        "megatron-core": megatron_version,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }


def digest(package: str) -> str | None:
    """Return 12 hex digits of the SHA-256 of a package's Python files and their paths, or None without the package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    found = hashlib.sha256()
    for root in spec.submodule_search_locations or ():
        # Each rank reads 800 files when it starts. Paths are plain texts: objects take longer than the hash.
        for folder, folders, files in os.walk(root):
            folders.sort()
            for name in sorted(file for file in files if file.endswith(".py")):
                path = os.path.join(folder, name)
                found.update(path.removeprefix(root).encode())
                with open(path, "rb") as file:
                    found.update(file.read())
    return found.hexdigest()[:12]


def version(distribution: str) -> str | None:
    """Return the version of a distribution, or None if the distribution is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
