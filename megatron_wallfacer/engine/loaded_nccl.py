"""The NCCL release that a process loads, as printed by ``python -m megatron_wallfacer.engine.loaded_nccl``.

``torch.cuda.nccl.version()`` is the release that torch was built with. ``LD_PRELOAD`` or ``LD_LIBRARY_PATH`` may load
another release.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path


def loaded_nccl() -> tuple[int, ...] | None:
    """Return the NCCL version of this process as (major, minor, patch); None if torch has no NCCL."""
    import torch
    import torch.distributed as dist

    # A preloaded library is found first, as in calls by torch.
    for path in (None, *_mapped()):
        library = ctypes.CDLL(path)
        if hasattr(library, "ncclGetVersion"):
            code = ctypes.c_int()
            library.ncclGetVersion(ctypes.byref(code))
            return version_of(code.value)
    # NCCL is linked into torch.
    return tuple(torch.cuda.nccl.version()[:3]) if dist.is_nccl_available() else None


def version_of(code: int) -> tuple[int, int, int]:
    """Return the version that ``ncclGetVersion`` encodes as an integer: 2.30.7 for 23007, 2.8.4 for 2804."""
    unit = 10_000 if code >= 10_000 else 1_000
    return code // unit, code % unit // 100, code % 100


def _mapped() -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = (line.split(maxsplit=5)[5] for line in lines if "libnccl.so" in line)
    return list(dict.fromkeys(paths))


def main() -> None:
    """Print the number of GPUs and the NCCL version as JSON."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    print(json.dumps({"gpus": gpus, "nccl": loaded_nccl()}))


if __name__ == "__main__":
    main()
