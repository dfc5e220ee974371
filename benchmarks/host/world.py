"""One rank of a job of any size in one process, on torch's fake process group: messages cost a call and no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """Make this process a rank of a job whose other ranks do not exist.

    The fake backend leaves received tensors as they were. Objects are gathered as if every rank had sent the same one,
    because the ranks exchange what they have in common before they make process groups.

    Args:
        rank: index of this process.
        size: ranks of the job.
    """
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        with mock.patch.object(dist, "all_gather_object", _same_object_from_every_rank):
            yield
    finally:
        dist.destroy_process_group()


def _same_object_from_every_rank(gathered: list[Any], mine: Any, group: dist.ProcessGroup | None = None) -> None:
    gathered[:] = [mine] * len(gathered)
