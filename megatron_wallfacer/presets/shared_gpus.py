"""Choose environment variables and arguments for several ranks on one GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from megatron_wallfacer.presets.entry import NO_GPU

#: First NCCL release that supports several ranks on one GPU.
MULTI_RANK = (2, 30)
#: NCCL variable that enables several ranks on one GPU.
ENABLE = "NCCL_MULTI_RANK_GPU_ENABLE"
#: Largest number of thread blocks of one NCCL operation on a Hopper GPU with one rank.
USUAL_CTAS = 32
BACKEND, TRANSFERS = "--distributed-backend", "--wallfacer-transfers"


@dataclass(frozen=True)
class GpuSharing:
    """Settings that allow several ranks of a node to share one GPU.

    Attributes:
        environment: environment variables to add.
        flags: arguments to add to the command line of the Megatron script.
        line: line for the log, or empty if each rank has a GPU of its own.
    """

    environment: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    line: str = ""


@dataclass(frozen=True)
class NodeGpus:
    """Number of GPUs that PyTorch finds on this node, and version of the NCCL that PyTorch loads; None without NCCL."""

    count: int = 0
    nccl: tuple[int, ...] | None = None


def share_gpus(gpus: NodeGpus, ranks: int, arguments: Sequence[str]) -> GpuSharing:
    """Return the settings for more ranks than GPUs: NCCL if the version is new enough, else gloo through host memory.

    Each rank has its own NCCL thread blocks, and all ranks on a GPU share its multiprocessors. With R ranks per GPU,
    each rank gets at most 1/R of NCCL's usual number of thread blocks. The settings contain no flags if ``arguments``
    has ``--distributed-backend`` or ``--wallfacer-transfers``.
    """
    if gpus.count == 0 or ranks <= gpus.count:
        return GpuSharing()
    names = {argument.partition("=")[0] for argument in arguments}
    if names & {BACKEND, TRANSFERS} and not _names_nccl(arguments):
        return GpuSharing()
    shared = f"{ranks} ranks share {gpus.count} GPU{'s' if gpus.count > 1 else ''}"
    version = "no NCCL" if gpus.nccl is None else f"NCCL {'.'.join(map(str, gpus.nccl))}"
    if gpus.nccl is not None and gpus.nccl[:2] >= MULTI_RANK:
        ranks_per_gpu = -(-ranks // gpus.count)
        environment = {ENABLE: "1", "NCCL_MAX_CTAS": str(max(1, USUAL_CTAS // ranks_per_gpu))}
        text = " ".join(f"{name}={value}" for name, value in environment.items())
        return GpuSharing(environment, (), f"{shared} over {version} ({text}): for debugging, not for speed")
    flags = () if names & {BACKEND, TRANSFERS} else (BACKEND, "gloo", TRANSFERS, "staged")
    needed = ".".join(map(str, MULTI_RANK))
    effect = f"messages go through host memory ({' '.join(flags)})" if flags else "NCCL will stop with an error"
    return GpuSharing({}, flags, f"{shared}, {version} is installed, sharing needs {needed} or newer: {effect}")


def sharing_on_this_node(ranks: int, arguments: Sequence[str], environment: Mapping[str, str]) -> GpuSharing:
    """Return the settings for this node, without variables that are already set."""
    if ranks == 1 or "--wallfacer-cp-size" not in {argument.partition("=")[0] for argument in arguments}:
        return GpuSharing()
    sharing = share_gpus(gpus_of_node(environment), ranks, arguments)
    unset = {name: value for name, value in sharing.environment.items() if name not in environment}
    return GpuSharing(unset, sharing.flags, sharing.line)


def gpus_of_node(environment: Mapping[str, str]) -> NodeGpus:
    """Return GPUs and NCCL version of this node. If the node has a GPU, a new process imports PyTorch to count GPUs."""
    hidden = environment.get("CUDA_VISIBLE_DEVICES") in NO_GPU
    if hidden or not (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()):
        return NodeGpus()
    command = [sys.executable, "-m", "megatron_wallfacer.engine.loaded_nccl"]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True)
    if done.returncode != 0:
        return NodeGpus()  # importing PyTorch fails, and the ranks will print that error
    output = json.loads(done.stdout.splitlines()[-1])
    return NodeGpus(output["gpus"], tuple(output["nccl"]) if output["nccl"] else None)


def _names_nccl(arguments: Sequence[str]) -> bool:
    """Return whether ``arguments`` and the default values make ranks exchange tensors directly over NCCL."""
    parts = [part for argument in arguments for part in argument.split("=", 1)]
    values = {flag: value for flag, value in pairwise(parts) if flag in (BACKEND, TRANSFERS)}
    return values.get(BACKEND, "nccl") == "nccl" and values.get(TRANSFERS, "direct") == "direct"
