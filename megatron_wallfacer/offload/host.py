"""Measure free host memory, and allocate slots in host memory once at their exact size."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.offload.slots import Slot

#: Alignment of the tensors in a slot, in bytes.
ALIGNMENT = 256


class Left(NamedTuple):
    """Bytes of host memory that a process may still allocate, and the name of the limit that determines them."""

    nbytes: int
    limit: str


def memory_left(root: Path = Path("/")) -> Left:
    """Return the free host memory: the minimum over the node and the control groups of this process."""
    return min([_of_machine(root), *_of_groups(root)])


def _of_machine(root: Path) -> Left:
    lines = (root / "proc/meminfo").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return Left(kib * 1024, "MemAvailable of /proc/meminfo")


def _of_groups(root: Path) -> Iterator[Left]:
    """Yield the free memory, including file caches, of each control group (versions 1 and 2) of this process."""
    names = {
        "": ("memory.max", "memory.current", ("active_file", "inactive_file")),
        "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    }
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers != "" and "memory" not in controllers.split(","):
            continue
        mounted = "memory" if controllers else ""
        limit, used, caches = names[mounted]
        group = Path(path.lstrip("/"))
        # In a container the path may not exist, and then the mount point itself is the group.
        for parent in (group, *group.parents):
            folder = root / "sys/fs/cgroup" / mounted / parent
            allowed = _number(folder / limit)
            if allowed is not None:
                stat = map(str.split, _text(folder / "memory.stat").splitlines())
                cached = sum(int(value) for name, value in stat if name in caches)
                yield Left(max(0, allowed - (_number(folder / used) or 0) + cached), f"{limit} of its control group")


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def slot_bytes(sizes: Iterable[int]) -> int:
    """Return the bytes of a slot for tensors of the given sizes in bytes."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


class HostSlots:
    """Slots in one allocation of host memory, which is pinned for copies by a GPU if ``pinned`` is True.

    PyTorch's pinned allocator rounds a size up to a power of two, so this class pins an ordinary allocation instead.

    Raises:
        WallfacerError: The memory cannot be allocated or pinned.
    """

    def __init__(self, slots: Iterable[Slot], *, pinned: bool) -> None:
        ordered = sorted(set(slots))
        sizes = [slot.nbytes for slot in ordered]
        self.nbytes = sum(sizes)
        self._memory = _allocate(self.nbytes)
        if pinned and self.nbytes:
            _pin(self._memory)
        self._views = dict(zip(ordered, self._memory.split(sizes), strict=True))

    def __getitem__(self, slot: Slot) -> Tensor:
        """Return the memory of a slot, a uint8 tensor ``[nbytes]``."""
        return self._views[slot]

    def __contains__(self, slot: Slot) -> bool:
        return slot in self._views


def _allocate(total: int) -> Tensor:
    try:
        return torch.empty(total, dtype=torch.uint8)
    except RuntimeError as error:
        raise WallfacerError(f"{gigabytes(total)} of host memory cannot be allocated") from error


def _pin(memory: Tensor) -> None:
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if code:
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        allowed = "any amount" if soft == resource.RLIM_INFINITY else gigabytes(soft)
        raise WallfacerError(
            f"{gigabytes(memory.nbytes)} of host memory cannot be pinned: CUDA error {code} of cudaHostRegister; "
            f"ulimit -l allows {allowed}"
        )


def gigabytes(nbytes: float) -> str:
    """Return a size in GB (1e9 bytes) as text for messages."""
    return f"{nbytes / 1e9:.3g} GB"
