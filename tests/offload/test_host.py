"""Host memory that is left, and slots at their exact size."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.offload import host
from megatron_wallfacer.offload.host import HostSlots, Left, memory_left, slot_bytes
from megatron_wallfacer.offload.slots import Slot

GIB = 1 << 30


def machine(root: Path, **files: str) -> Path:
    """A file system with 64 GiB of available memory, and control groups."""
    given = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {64 * GIB // 1024} kB\n", **files}
    for name, text in given.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_control_groups_the_machine_decides(tmp_path: Path) -> None:
    assert memory_left(machine(tmp_path)) == Left(64 * GIB, "MemAvailable of /proc/meminfo")
    assert memory_left().nbytes > 0


def test_the_smallest_control_group_decides_and_its_file_cache_is_free(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/job/rank\n",
        "sys/fs/cgroup/job/rank/memory.max": "max\n",
        "sys/fs/cgroup/job/memory.max": f"{32 * GIB}\n",
        "sys/fs/cgroup/job/memory.current": f"{10 * GIB}\n",
        "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file {GIB}\n",
    }
    assert memory_left(machine(tmp_path, **files)) == Left(24 * GIB, "memory.max of its control group")


def test_the_group_of_a_container_and_version_1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu:/\n4:memory:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{8 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    }
    assert memory_left(machine(tmp_path, **files)) == Left(7 * GIB, "memory.limit_in_bytes of its control group")


def test_slots_are_of_the_exact_size_and_do_not_overlap() -> None:
    assert slot_bytes([1, 256, 300]) == 256 + 256 + 512
    slots = HostSlots([Slot(512, 1), Slot(512, 0), Slot(256, 0), Slot(512, 0)], pinned=False)
    assert slots.nbytes == 512 + 512 + 256
    starts = sorted((slots[slot].data_ptr(), slot.nbytes) for slot in (Slot(256, 0), Slot(512, 0), Slot(512, 1)))
    assert all(start + nbytes <= after for (start, nbytes), (after, _) in pairwise(starts))
    assert Slot(256, 1) not in slots


def test_memory_is_pinned_as_it_was_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    runtime = SimpleNamespace(cudaHostRegister=lambda *args: calls.append(args) or 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    slots = HostSlots([Slot(768, 0), Slot(768, 1)], pinned=True)
    assert calls == [(slots[Slot(768, 0)].data_ptr(), 1536, 0)]


def test_memory_that_cannot_be_pinned_or_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *args: 2))
    monkeypatch.setattr(host.resource, "getrlimit", lambda which: (8_000_000, 8_000_000))
    with pytest.raises(WallfacerError, match=r"CUDA error 2 of cudaHostRegister; ulimit -l allows 0\.008 GB"):
        HostSlots([Slot(768, 0)], pinned=True)
    with pytest.raises(WallfacerError, match="1e\\+09 GB of host memory cannot be allocated"):
        HostSlots([Slot(10**18, 0)], pinned=False)
