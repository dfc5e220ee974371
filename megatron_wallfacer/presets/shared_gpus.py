"""Several ranks on one GPU: what their environment and their arguments must have."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

#: NCCL's first release that takes several ranks on one GPU.
MULTI_RANK = (2, 30)
#: Variable with which it does.
ENABLE = "NCCL_MULTI_RANK_GPU_ENABLE"
#: Thread blocks that NCCL uses at most per operation of a rank with a GPU of its own (Hopper).
USUAL_CTAS = 32
BACKEND, TRANSFERS = "--distributed-backend", "--wallfacer-transfers"
#: Values of CUDA_VISIBLE_DEVICES with which the launcher trains on the CPU.
_NO_GPU = ("", "-1", "NoDevFiles")


@dataclass(frozen=True)
class Sharing:
    """How the ranks of one host share its GPUs.

    Attributes:
        environment: variables that the ranks need.
        flags: arguments that the Megatron script needs.
        line: one line for the log; empty where nothing is shared.
    """

    environment: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    line: str = ""


@dataclass(frozen=True)
class Gpus:
    """GPUs of this host, and the NCCL that the ranks load.

    Attributes:
        count: number of GPUs that torch sees.
        nccl: version of the loaded NCCL; None where there is none.
    """

    count: int = 0
    nccl: tuple[int, ...] | None = None


def share_gpus(gpus: Gpus, ranks: int, arguments: Sequence[str]) -> Sharing:
    """Decide how ranks share GPUs: over NCCL if it is new enough, else over gloo through host memory.

    NCCL gives each rank thread blocks of its own, and a GPU can run out of them. So all ranks of one GPU together get
    as many as one rank gets elsewhere.

    Args:
        gpus: of this host.
        ranks: ranks of the job on this host.
        arguments: Megatron's and the plugin's. A backend or a kind of transfers that they name is kept.
    """
    if gpus.count == 0 or ranks <= gpus.count:
        return Sharing()
    typed = {word.partition("=")[0] for word in arguments}
    if typed & {BACKEND, TRANSFERS} and not _names_nccl(arguments):
        return Sharing()
    shared = f"{ranks} ranks share {gpus.count} GPU{'s' if gpus.count > 1 else ''}"
    version = "no NCCL" if gpus.nccl is None else f"NCCL {'.'.join(map(str, gpus.nccl))}"
    if gpus.nccl is not None and gpus.nccl[:2] >= MULTI_RANK:
        of_one = -(-ranks // gpus.count)
        environment = {ENABLE: "1", "NCCL_MAX_CTAS": str(max(1, USUAL_CTAS // of_one))}
        words = " ".join(f"{name}={value}" for name, value in environment.items())
        return Sharing(environment, (), f"{shared} over {version} ({words}): for debugging, not for speed")
    flags = () if typed & {BACKEND, TRANSFERS} else (BACKEND, "gloo", TRANSFERS, "staged")
    needed = ".".join(map(str, MULTI_RANK))
    how = f"messages go through host memory ({' '.join(flags)})" if flags else "NCCL will refuse"
    return Sharing({}, flags, f"{shared}, {version} here, {needed} or newer is needed to share one: {how}")


def sharing_here(ranks: int, arguments: Sequence[str], environment: Mapping[str, str]) -> Sharing:
    """Decide for this host.

    Args:
        ranks: ranks of the job on this host.
        arguments: Megatron's and the plugin's.
        environment: that the ranks will have. Variables that it sets are not in the answer's.
    """
    if ranks == 1 or "--wallfacer-cp-size" not in {word.partition("=")[0] for word in arguments}:
        return Sharing()
    sharing = share_gpus(gpus_of_host(environment), ranks, arguments)
    unset = {name: value for name, value in sharing.environment.items() if name not in environment}
    return Sharing(unset, sharing.flags, sharing.line)


def gpus_of_host(environment: Mapping[str, str]) -> Gpus:
    """Ask torch, in a process of its own with the ranks' environment; not where there is no GPU to ask about."""
    hidden = environment.get("CUDA_VISIBLE_DEVICES") in _NO_GPU
    if hidden or not (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()):
        return Gpus()
    asked = subprocess.run(
        [sys.executable, "-m", "megatron_wallfacer.engine.loaded_nccl"],
        env=dict(environment),
        capture_output=True,
        text=True,
    )
    if asked.returncode != 0:
        return Gpus()  # torch does not import: the ranks will say so
    answer = json.loads(asked.stdout.splitlines()[-1])
    return Gpus(answer["gpus"], tuple(answer["nccl"]) if answer["nccl"] else None)


def _names_nccl(arguments: Sequence[str]) -> bool:
    """Whether the arguments ask for NCCL's direct messages by name."""
    words = [part for word in arguments for part in word.split("=", 1)]
    values = {flag: value for flag, value in pairwise(words) if flag in (BACKEND, TRANSFERS)}
    return values.get(BACKEND, "nccl") == "nccl" and values.get(TRANSFERS, "direct") == "direct"
